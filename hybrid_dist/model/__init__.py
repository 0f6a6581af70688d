"""The model: two timm backbones side by side, their fusion, a head for each task."""

import sys


def _import_timm() -> None:
    """timm loads wandb where it is installed, on every rank, for something that is not used here."""
    if "wandb" in sys.modules:
        import timm
    else:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # an import that fails, which timm expects
        try:
            import timm  # noqa: F401
        finally:
            del sys.modules["wandb"]


_import_timm()
