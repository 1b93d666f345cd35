"""One module per tab: `build(lab)` makes its components inside the tab, then wires plain callbacks."""
