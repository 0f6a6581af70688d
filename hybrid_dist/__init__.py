"""hybrid-dist: a ConvNeXt and a Swin Transformer side by side, on several tasks, over any number of GPUs."""

__version__ = "0.1.0"
