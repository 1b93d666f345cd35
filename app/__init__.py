"""What a person sees, and the processes behind the buttons. Only app/worker*.py may import torch."""
