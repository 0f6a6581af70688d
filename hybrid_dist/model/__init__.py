"""The model: two timm backbones side by side, their fusion, a head for each task."""
