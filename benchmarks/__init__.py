"""One command per figure in the documents. Each module opens with its command."""
