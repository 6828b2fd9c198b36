"""Weights of a folder."""

from itertools import chain

from torch import nn

from flexsparse.training.errors import RunError


def check_complete(option: str, given: str, model: nn.Module) -> None:
    """Check that a model's folder had all of its weights; diffusers warns of those that it leaves without memory.

    Args:
        option: name of the option that names the folder.
        given: the folder.
        model: as `from_pretrained` returned it.

    Raises:
        RunError: weights are missing.
    """
    missing = [name for name, x in chain(model.named_parameters(), model.named_buffers()) if x.is_meta]
    if missing:
        raise RunError(
            f"--{option} {given!r} lacks {len(missing)} weights of a {type(model).__name__} ({', '.join(missing[:3])}, ...): "
            "pass a folder as save_pretrained writes it, of this version of diffusers"
        )
