"""The torch.compile backend: rewrites attention in the captured graph, then hands it to Inductor.

Shape letters: B batch, H query heads, S tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse.attention import case_of
from flexsparse.backends import choose
from flexsparse.calls import CallParts, autocast_dtype
from flexsparse.compile_passes import FuseSelection, KeepTiles, LowerFlex, RewriteError, RewriteSDPA, UnfoldAttention
from flexsparse.compile_passes.fusion_guard import compile_eagerly, compile_guarded
from flexsparse.grids import Grid
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder, StaticBuilder
from flexsparse.reporting import Call, Report


class Backend:
    """A torch.compile backend that makes self-attention over video tokens sparse, then runs Inductor.

    Made by `backend`. Also what `wrap` compiles with.
    """

    def __init__(
        self,
        builder: MaskBuilder,
        *,
        tile: Sequence[int] | str = (4, 4, 4),
        grid: Sequence[int] | None = None,
        expect: int | None = None,
        fuse_selection: bool = True,
        lower_flex: bool = True,
        keep_tiles: bool = True,
        text_first: int = 0,
        text_last: int = 0,
        min_tokens: int = 0,
        attention: str = "auto",
        inner: str = "inductor",
        gates: bool = False,
        wrapped: bool = False,
    ) -> None:
        if not callable(getattr(builder, "select", None)):
            raise TypeError(f"builder is {builder!r}: give a mask builder, such as flexsparse.VSA(sparsity=0.9)")
        if gates and not getattr(builder, "has_coarse", False):
            raise ValueError(
                f"gates are on, but {type(builder).__name__} has no coarse output: use VSA or TopP, or no gates"
            )
        if inner not in ("inductor", "aot_eager"):
            raise ValueError(
                f"inner is {inner!r}: give 'inductor', or 'aot_eager' to leave out Inductor when debugging"
            )
        if expect is not None and expect < 0:
            raise ValueError(f"expect is {expect}: give how many sparse calls a graph has, at least 0, or None")
        self.builder, self.tile = builder, tile if isinstance(tile, str) else tuple(tile)
        self.grid: Grid | None = None if grid is None else tuple(grid)  # type: ignore[assignment]
        self.text_first, self.text_last = text_first, text_last
        self.layout_of(self.grid or (1, 1, 1))  # raises for a tile, grid or text length that makes no sense
        self.expect, self.min_tokens, self.attention, self.gates = expect, min_tokens, attention, gates
        self.fuse_selection, self.lower_flex, self.keep_tiles = fuse_selection, lower_flex, keep_tiles
        self.inner, self.wrapped = inner, wrapped
        self.calls = Report()

    def layout_of(self, grid: Grid) -> TileLayout:
        """The layout of a grid, with this backend's tile and extra tokens."""
        return TileLayout(grid=grid, tile=self.tile, text_first=self.text_first, text_last=self.text_last)  # type: ignore[arg-type]

    def report(self) -> Report:
        """Every attention call met so far; prints as a table."""
        return self.calls

    def check(self, grid: Grid) -> None:
        """Raise a `ValueError` where the builder cannot work on a grid."""
        layout = self.layout_of(grid)
        if isinstance(self.builder, MaskBuilder):
            self.builder.check(layout, layout)

    def choose_backend(self, q: Tensor, grid: Grid, *, compiled: bool, gradients: bool) -> tuple[str, str]:
        """The attention backend of a call, and why."""
        dtype = autocast_dtype(q.device.type) or q.dtype
        layout = self.layout_of(grid)
        case = case_of(q, layout, dtype=dtype, gradients=gradients, lse=False, compiled=compiled)
        return choose(self.attention, case, templates=self.lower_flex or not compiled)

    def in_graph(self, chosen: str, q: Tensor) -> str:
        """The backend that a graph shows before `LowerFlex`: FlexAttention stands for what the templates take over."""
        flexible = q.dtype != torch.float64 and (chosen in ("flex", "triton") or self.attention == "auto")
        return "flex" if self.lower_flex and flexible else chosen

    def describe(
        self, name: str, q: Tensor, k: Tensor, grid: Grid | None, reason: str | None, chosen: tuple[str, str]
    ) -> Call:
        """The report's row for a call; ``reason`` is why it stayed dense, ``chosen`` the backend and why."""
        sizes = (*q.shape[:3], k.shape[2], q.shape[3]) if q.dim() == 4 and k.dim() == 4 else tuple(q.shape)
        shape = tuple(size if isinstance(size, int) else -1 for size in sizes)
        if reason is not None:
            return Call(name=name, sparse=False, reason=reason, backend="sdpa", shape=shape, density=1.0)
        density = math.nan
        if grid is not None and isinstance(self.builder, MaskBuilder):
            T, H, W = (size if isinstance(size, int) else int(size.node.hint) for size in grid)
            layout = self.layout_of((T, H, W))
            density = self.builder.nominal_density(layout, layout)
        return Call(name=name, sparse=True, reason=chosen[1], backend=chosen[0], shape=shape, density=density)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        """Rewrite a captured graph and compile it with Inductor.

        Args:
            gm: Dynamo's graph.
            example_inputs: its inputs.
            options: ``mode`` and ``options`` of torch.compile, which go to Inductor.

        Raises:
            RewriteError: no call could be made sparse, or not as many as expected; torch wraps it into its own error.
        """
        return self.compile(gm, example_inputs, "", options)

    def compile(
        self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], region: str, options: Mapping[str, Any]
    ) -> Any:
        """As calling the backend, for a region that several modules run (its name ends in ``::``)."""
        builder = self.builder
        schedules = builder.schedules() if isinstance(builder, MaskBuilder) else ()
        met = Report()

        def seen(name: str, q: Tensor, k: Tensor, grid: Grid | None, reason: str | None) -> dict[str, Any]:
            chosen, runs = ("sdpa", ""), "sdpa"
            if reason is None and grid is not None:
                gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
                chosen = self.choose_backend(q, grid, compiled=True, gradients=gradients)
                runs = self.in_graph(chosen[0], q)
            name = met.unused(region + name)
            met.record(self.describe(name, q, k, grid, reason, chosen))
            return {"backend": runs, "name": name} if reason is None else {}

        parts = CallParts(builder, schedules, self.layout_of)
        rewrite = RewriteSDPA(
            parts.attend,
            seen,
            grid=self.grid,
            extra=self.text_first + self.text_last,
            min_tokens=self.min_tokens,
            schedules=[schedule.tensor for schedule in schedules],
            gates=self.gates,
        )
        rewrite(gm)
        self._verify(rewrite, met)
        if self.keep_tiles and isinstance(builder, MaskBuilder):  # another's builder reads tokens in raster order
            keep = KeepTiles(parts.attend, parts)
            keep(gm)
            met.annotate(notes=_said_of_order(keep))
        UnfoldAttention(parts.attend, parts)(gm)
        if self.fuse_selection:
            fuse = FuseSelection()
            fuse(gm)
            met.annotate(fused=fuse.fused, notes=self._why_not_fused(fuse, met))
        lower = LowerFlex() if self.lower_flex else None
        if self.inner == "aot_eager":
            compiled = compile_eagerly(gm, list(example_inputs), lower)
        else:
            compiled = compile_guarded(gm, list(example_inputs), _inductor_options(options), lower)
        if lower is not None:
            self._note_lowering(lower, met)
        self.calls.update(met)
        return compiled

    def _why_not_fused(self, fuse: FuseSelection, met: Report) -> dict[str, str]:
        if isinstance(self.builder, StaticBuilder):
            return {}  # static tiles have no coarse stage
        notes = {name: f"not fused: {why}" for name, why in fuse.refused.items()}
        hidden = {call.name for call in met.all() if call.sparse} - fuse.fused - notes.keys()
        why = "not fused: the graph shows no coarse stage (it is inside of torch's own multi-head attention, or there is none)"
        return notes | dict.fromkeys(hidden, why)

    def _note_lowering(self, lower: LowerFlex, met: Report) -> None:
        known = {call.name for call in met.all()}
        refused = {name: why for name, why in lower.refused.items() if name in known}
        if self.attention == "triton" and refused:
            name, why = next(iter(refused.items()))
            raise RewriteError(f"attention is 'triton', but the templates cannot do {name}: {why}")
        met.annotate(
            lowered=lower.lowered & known, notes={name: f"not lowered: {why}" for name, why in refused.items()}
        )
        met.rename_backend("triton", "flex", refused)

    def _verify(self, rewrite: RewriteSDPA, met: Report) -> None:
        if self.expect is not None:
            if rewrite.matches != self.expect:
                raise RewriteError(
                    f"expect is {self.expect} sparse attention calls, but this graph has {rewrite.matches}. Seen:\n{met}"
                )
            return
        if self.wrapped and rewrite.calls and not rewrite.marked:
            raise RewriteError(
                "the model's own code breaks the graph, and these attention calls lie after the break, where the grid is "
                "not known; they would stay dense. Use wrap(..., compile='regional') or compile=False, or mend the break "
                f"(fullgraph=True shows it). Seen:\n{met}"
            )
        if rewrite.matches == 0 and not self.calls.sparse_calls and (rewrite.calls or _is_whole_call()):
            raise RewriteError(no_match("the compiled model", self.layout_of(self.grid) if self.grid else None, met))


def no_match(model: str, layout: TileLayout | None, seen: Report) -> str:
    """What is said where nothing became sparse."""
    expected = "" if layout is None else f", with the {layout.seq_len} tokens of grid {layout.grid},"
    calls = str(seen) if seen.calls else "no scaled_dot_product_attention call at all"
    return (
        f"flexsparse found no attention in {model} to make sparse: it looks for scaled_dot_product_attention of the video's "
        f"tokens among themselves{expected} without a mask. Check grid=, text_first= and text_last=. Seen:\n{calls}"
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


def _said_of_order(keep: KeepTiles) -> dict[str, str]:
    refused = {name: f"tokens reordered in the call: {why}" for name, why in keep.refused.items()}
    return dict.fromkeys(keep.kept, "tokens stay in tile order") | refused


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    config: dict[str, Any] = dict(list_mode_options(options["mode"])) if options.get("mode") else {}
    config.update(options.get("options") or {})
    return config


def backend(
    builder: Any,
    tile: Sequence[int] | str = (4, 4, 4),
    grid: Sequence[int] | None = None,
    expect: int | None = None,
    **options: Any,
) -> Backend:
    """A torch.compile backend that makes attention over video tokens sparse.

    >>> model = torch.compile(model, backend=fs.backend(fs.VSA(sparsity=0.9), grid=(21, 30, 52)), fullgraph=True)

    Args:
        builder: a mask builder.
        tile: tokens of one tile along (t, h, w), or ``"auto"``.
        grid: the latent token grid (T, H, W). A graph of a wrapped model says its own, any other needs this.
        expect: how many sparse calls every graph must have; None for at least one.
        options: ``text_first``, ``text_last`` (extra tokens in every call), ``min_tokens`` (shorter calls stay dense),
            ``attention`` (``"auto"`` or a backend's name), ``inner`` (``"inductor"``, or ``"aot_eager"`` to leave out
            code generation when debugging), ``fuse_selection``, ``lower_flex`` and ``keep_tiles`` (off, the graph keeps the
            coarse stage's own nodes, stock FlexAttention, or tokens in raster order between calls; for comparison).

    Returns:
        The backend; its ``report()`` says what became of every attention call.

    Raises:
        TypeError: an unknown option, or a builder that is none.
        ValueError: an argument out of range.
    """
    return Backend(builder, tile=tile, grid=grid, expect=expect, **options)


def by_name(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
    """``torch.compile(model, backend="flexsparse", options={"builder": ..., "grid": ..., ...})``.

    ``options`` holds the arguments of `backend`.

    Raises:
        ValueError: no builder.
    """
    own = dict(options.get("options") or {})
    if "builder" not in own:
        raise ValueError(
            "backend='flexsparse' has no builder: give torch.compile(..., options={'builder': flexsparse.VSA(sparsity=0.9), "
            "'grid': (T, H, W)}), or backend=flexsparse.backend(...)"
        )
    return backend(**own)(gm, example_inputs, mode=options.get("mode"))
