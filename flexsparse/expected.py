"""Which sparse calls a compiled graph has to have, and what is said where it has not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexsparse import naming
from flexsparse.errors import RewriteError
from flexsparse.layout import TileLayout
from flexsparse.reporting import DENSE, Report
from flexsparse.rules import BuilderRules

if TYPE_CHECKING:
    from flexsparse.compile_passes import RewriteSDPA
    from flexsparse.compiler import Backend


def verify(backend: Backend, rewrite: RewriteSDPA, met: Report, is_region: bool) -> None:
    """Raise where a graph has not the sparse calls that it should have.

    Args:
        backend: what rewrote the graph.
        rewrite: what it found in it.
        met: the report of this graph's calls.
        is_region: whether the graph is a region, which need not have any.

    Raises:
        RewriteError: another number of sparse calls than expected, none at all, or calls behind a graph break.
    """
    if rewrite.marked and not backend.wrapped:
        raise RewriteError(
            "this model is wrapped by flexsparse, and was compiled by a flexsparse.backend(...), whose builders would "
            "take the place of its own: let wrap(model, ..., compile=True) or compile='regional' compile it, or unwrap it "
            "and give that backend its builder"
        )
    if backend.expect is not None:
        if rewrite.matches != backend.expect:
            raise RewriteError(
                f"expect is {backend.expect} sparse attention calls, but this graph has {rewrite.matches}. Seen:\n{met}"
            )
        return
    if backend.wrapped and rewrite.calls and not rewrite.marked:
        raise RewriteError(
            "the model's own code breaks the graph, and these attention calls lie after the break, where the grid is "
            "not known; they would stay dense. Use wrap(..., compile='regional') or compile=False, or mend the break "
            f"(fullgraph=True shows it). Seen:\n{met}"
        )
    if rewrite.matches or is_region:
        return  # not every region has attention over video; the model's forward sees whether any had
    if backend.calls.sparse_calls and not backend.wrapped and not _turned_dense(backend, met):
        return  # another part of the model
    as_asked = rewrite.calls and all(call.reason == DENSE for call in met.all())
    if not as_asked and (rewrite.calls or _is_whole_call()):
        layout = backend.layout_of(backend.geometry) if backend.geometry else None
        raise RewriteError(no_match("the compiled model", layout, met, bool(backend.calls.sparse_calls)))


def check_name(rules: BuilderRules, name: str, is_region: bool) -> None:
    """Raise where builders go by names and it is not known in which module of the model a call is."""
    root = naming.root()
    if root is None or all(pattern == "*" for pattern, _ in rules.rules) or (name == "." and is_region):
        return
    if name not in dict(root.named_modules()):
        raise RewriteError(
            f"in which module of {type(root).__name__} an attention call is, is not known (found: {name!r}), but builders "
            "or dense_layers go by module names: let the model call its modules, and not their forward, or give "
            "wrap(..., compile=False)"
        )


def _turned_dense(backend: Backend, met: Report) -> bool:
    """Whether a call that an earlier graph made sparse is dense in this one, and nobody asked for it."""
    before = {call.name for call in backend.calls.all() if call.sparse}
    return not backend.min_tokens and any(call.name in before and call.reason != DENSE for call in met.all())


def no_match(model: str, layout: TileLayout | None, seen: Report, before: bool) -> str:
    """What is said where nothing became sparse; ``before``: whether earlier calls were."""
    expected = "" if layout is None else f", with the {layout.seq_len} tokens of grid {layout.grid},"
    calls = str(seen) if seen.calls else "no scaled_dot_product_attention call at all"
    caches = " Calls before were sparse: a cache that leaves attention out is enabled after wrap(..., compile=False)."
    return (
        f"flexsparse found no attention in {model} to make sparse: it looks for scaled_dot_product_attention of the video's "
        f"tokens among themselves{expected} without a mask over them. Check grid=, text_first= and text_last=."
        f"{caches if before else ''} Seen:\n{calls}"
    )


def _is_whole_call() -> bool:
    """Whether the graph being compiled is a whole call, and not a piece between graph breaks."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tx = InstructionTranslator.current_tx()
        reason = tx.output.compile_subgraph_reason
        resumed = tx.f_code.co_name.startswith("torch_dynamo_resume")
    except AttributeError:  # not called by Dynamo
        return False
    return not resumed and (reason is None or not reason.graph_break)
