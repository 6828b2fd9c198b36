"""The torch.compile backend: rewrites attention in the captured graph, then hands it to Inductor.

Shape letters: B batch, H query heads, S tokens, D head dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from flexsparse import compile_passes as passes
from flexsparse import naming
from flexsparse.attention import case_of
from flexsparse.autocast import autocast_dtype
from flexsparse.backends import NAMES, choose
from flexsparse.builder_state import Watch, watched
from flexsparse.calls import CallParts
from flexsparse.compile_passes.plain_alpha import plain_alpha
from flexsparse.errors import RewriteError
from flexsparse.expected import check_name, verify
from flexsparse.grids import Geometry
from flexsparse.layout import TileLayout, axes_of
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.combine import name_of
from flexsparse.masks.static import StaticBuilder
from flexsparse.one_graph import splits_graphs
from flexsparse.reporting import DENSE, Call, Report, density_of
from flexsparse.rules import BuilderRules
from flexsparse.tally import Tally

OPTIONS = (
    "text_first",
    "text_last",
    "query_tile",
    "min_tokens",
    "attention",
    "inner",
    "fuse_selection",
    "lower_flex",
    "keep_tiles",
    "fold_tiling",
)
"""What `backend` and `wrap` take besides their named arguments."""


class Backend:
    """A torch.compile backend that makes self-attention over video tokens sparse, then runs Inductor.

    Made by `backend`. Also what `wrap` compiles with.
    """

    def __init__(
        self,
        builder: Any,
        *,
        tile: Sequence[int] | str = (4, 4, 4),
        query_tile: Sequence[int] | str | None = None,
        grid: Sequence[int] | None = None,
        expect: int | None = None,
        fuse_selection: bool = True,
        lower_flex: bool = True,
        keep_tiles: bool = True,
        fold_tiling: bool = True,
        text_first: int = 0,
        text_last: int = 0,
        min_tokens: int = 0,
        attention: str = "auto",
        inner: str = "inductor",
        gates: bool = False,
        wrapped: bool = False,
    ) -> None:
        self.rules = BuilderRules.of(builder)
        for one in self.rules.builders:
            if gates and not getattr(one, "has_coarse", False):
                raise ValueError(
                    f"gates are on, but {name_of(one)} has no coarse output: use VSA or TopP, or a combination with one of "
                    "them, or no gates"
                )
        if inner not in ("inductor", "aot_eager"):
            raise ValueError(
                f"inner is {inner!r}: give 'inductor', or 'aot_eager' to leave out Inductor when debugging"
            )
        if expect is not None and (not isinstance(expect, int) or isinstance(expect, bool) or expect < 0):
            raise ValueError(
                f"expect is {expect!r}: give how many sparse calls a graph (uncompiled: a forward) has, an int of at least 0, "
                "or None"
            )
        if attention not in NAMES:
            raise ValueError(f"attention is {attention!r}: give one of {', '.join(NAMES)}")
        if not isinstance(min_tokens, int) or min_tokens < 0:
            raise ValueError(f"min_tokens is {min_tokens!r}: give a number of tokens, an int of at least 0")
        self.tile = tile if isinstance(tile, str) else axes_of("tile", tile)
        named = query_tile is None or isinstance(query_tile, str)
        self.query_tile = query_tile if named else axes_of("query_tile", query_tile)
        self.geometry: Geometry | None = None if grid is None else (*axes_of("grid", grid), text_first, text_last)
        self.ragged = False
        self.parallel: Any = None  # set by `distributed.ulysses`: all-to-alls around the calls of one rank's tokens
        # raises for a tile, grid or text length that makes no sense
        self.layouts_of(self.geometry or (1, 1, 1, text_first, text_last))
        self.expect, self.min_tokens, self.attention, self.gates = expect, min_tokens, attention, gates
        self.fuse_selection, self.lower_flex, self.keep_tiles = fuse_selection, lower_flex, keep_tiles
        self.fold_tiling = fold_tiling and lower_flex
        self.inner, self.wrapped = inner, wrapped
        self.calls, self.tally, self.watch = Report(), Tally(), Watch()

    def layouts_of(self, geometry: Geometry) -> tuple[TileLayout, TileLayout]:
        """The layouts of queries and keys; one object where their tiles are the same."""
        *grid, first, last = geometry
        layout = TileLayout(grid=grid, tile=self.tile, text_first=first, text_last=last)  # type: ignore[arg-type]
        if self.query_tile is None or self.query_tile == self.tile:
            return layout, layout
        own = TileLayout(grid=grid, tile=self.query_tile, text_first=first, text_last=last)  # type: ignore[arg-type]
        return own, layout

    def layout_of(self, geometry: Geometry) -> TileLayout:
        """The layout of the queries."""
        return self.layouts_of(geometry)[0]

    def report(self) -> Report:
        """Every attention call met so far; prints as a table."""
        return self.calls

    def check(self, geometry: Geometry) -> None:
        """Raise a `ValueError` where a builder cannot work on a grid."""
        for builder in self.rules.builders:
            if isinstance(builder, MaskBuilder):
                builder.check(*self.layouts_of(geometry))

    def choose_backend(self, q: Tensor, geometry: Geometry, *, compiled: bool, gradients: bool) -> tuple[str, str]:
        """The attention backend of a call, and why."""
        dtype = autocast_dtype(q.device.type) or q.dtype
        layout = self.layout_of(geometry)
        case = case_of(q, layout, dtype=dtype, gradients=gradients, lse=False, compiled=compiled)
        return choose(self.attention, case, templates=self.lower_flex or not compiled, argument="attention")

    def in_graph(self, chosen: str, q: Tensor) -> str:
        """The backend that a graph shows before `LowerFlex`: FlexAttention stands for what the templates take over."""
        taken_over = self.attention == "auto" and not (
            q.is_cuda and chosen == "gather"
        )  # what the templates refuse as well
        flexible = q.dtype != torch.float64 and (chosen in ("flex", "triton") or taken_over)
        return "flex" if self.lower_flex and flexible else chosen

    def describe(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        geometry: Geometry | None,
        reason: str | None,
        chosen: tuple[str, str],
    ) -> Call:
        """The report's row for a call; ``reason`` is why it stayed dense, ``chosen`` the backend and why.

        Of a sparse call it has no density yet (`density`).
        """
        sizes = (*q.shape[:3], k.shape[2], q.shape[3]) if q.dim() == 4 and k.dim() == 4 else tuple(q.shape)
        shape = tuple(size if isinstance(size, int) else -1 for size in sizes)
        if reason is not None:
            return Call(name=name, sparse=False, reason=reason, backend="sdpa", shape=shape, density=1.0)
        return Call(name=name, sparse=True, reason=chosen[1], backend=chosen[0], shape=shape, density=math.nan)

    def density(self, builder: Any, geometry: Geometry | None) -> Callable[[], float] | None:
        """What asks a builder for its density, for a call's row; None where the grid is not known."""
        if geometry is None:
            return None
        numbers = tuple(size if isinstance(size, int) else int(size.node.hint) for size in geometry)
        return functools.partial(density_of, builder, *self.layouts_of(numbers))  # type: ignore[arg-type]

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        """Rewrite a captured graph and compile it with Inductor.

        Args:
            gm: Dynamo's graph.
            example_inputs: its inputs.
            options: ``mode`` and ``options`` of torch.compile, which go to Inductor.

        Raises:
            RewriteError: no call could be made sparse, or not as many as expected; torch wraps it into its own error.
        """
        return self.compile(gm, example_inputs, options)

    def compile_dense(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Compile a graph as it is, by the inner compiler."""
        plain_alpha(gm)
        return self._inner(gm, example_inputs, _inductor_options(options), None)

    def _inner(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any], joint: Any) -> Any:
        if self.inner == "aot_eager":
            return passes.compile_eagerly(gm, list(inputs), joint)
        return passes.compile_guarded(gm, list(inputs), config, joint)

    @watched
    def compile(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Mapping[str, Any],
        region: str = "",
        within: str = "",
        cut: bool = False,
    ) -> Any:
        """As calling the backend, for a region that several modules run.

        Args:
            gm: the graph.
            example_inputs: its inputs.
            options: of torch.compile.
            region: what stands before the names of its calls in the report; it ends in ``::``.
            within: the path of a module that runs it: what its builders are looked up by.
            cut: whether the tokens of a sequence parallel model are cut where it runs.
        """
        schedules = self.rules.schedules
        config = _inductor_options(options)
        if schedules and _captures(config, example_inputs):
            raise RewriteError(
                "a builder follows a SparsitySchedule, whose value is read when kernels are launched, and the options ask for "
                "CUDA graphs, which would keep the first value: give another mode ('max-autotune-no-cudagraphs', or none)"
            )
        if splits_graphs() and DistributedDataParallel._get_active_ddp_module() is not None:
            raise RewriteError(
                "DDP would have this graph split at its buckets, and attention in a piece does not show which tokens its keys "
                "are of: set torch._dynamo.config.optimize_ddp = False, or let fs.wrap(model, ...) compile the model, which "
                "needs no setting"
            )
        met = Report()

        def seen(
            name: str, q: Tensor, k: Tensor, geometry: Geometry | None, reason: str | None
        ) -> dict[str, Any] | str:
            chosen, runs, builder = ("sdpa", ""), "sdpa", None
            if reason is None and geometry is not None:
                check_name(self.rules, name, bool(region))
                builder = self.rules.index(f"{within}.{name}" if within else name)
                reason = DENSE if builder is None else None
            if reason is None and geometry is not None:
                gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
                chosen = self.choose_backend(q, geometry, compiled=True, gradients=gradients)
                runs = self.in_graph(chosen[0], q)
            name = met.unused(region + name)
            used = None if builder is None else self.rules.builders[builder]
            row = self.describe(name, q, k, geometry, reason, chosen)
            met.record(row, self.density(used, geometry) if row.sparse else None)
            return {"backend": runs, "name": name, "builder": builder} if reason is None else reason

        parts = CallParts(self.rules.builders, schedules, self.layouts_of)
        rewrite = passes.RewriteSDPA(
            parts.attend,
            seen,
            grid=self.geometry,
            min_tokens=self.min_tokens,
            schedules=[schedule.tensor for schedule in schedules],
            gates=self.gates,
            name_of=naming.name_of,
        )
        if self.parallel is not None:
            self.parallel.rewrite(gm, self, cut, within)
        rewrite(gm)
        plain_alpha(gm)
        verify(self, rewrite, met, is_region=bool(region))
        keep = None
        if self.keep_tiles and all(isinstance(b, MaskBuilder) for b in self.rules.builders):  # others read raster order
            keep = passes.KeepTiles(parts.attend, parts)
            keep(gm)
        passes.UnfoldAttention(parts.attend, parts)(gm)
        if self.fuse_selection:
            fuse = passes.FuseSelection()
            fuse(gm)
            met.annotate(fused=fuse.fused, notes=self._why_not_fused(fuse, met))
        if self.fold_tiling:
            passes.PoolTokens(parts)(gm)
        lower = passes.LowerFlex() if self.lower_flex else None
        fold = passes.FoldTiling() if self.fold_tiling else None
        joint = passes.InOrder(
            [each for each in (lower, fold, passes.LayOutput(), passes.ShareOperands()) if each is not None]
        )
        compiled = self._inner(gm, example_inputs, config, joint)
        if lower is not None:
            self._note_lowering(lower, met)
        met.annotate(notes=_said_of_order(keep, set() if fold is None else fold.folded))
        self.calls.update(met)
        return self.tally.counting(compiled, rewrite.matches) if self.wrapped else compiled

    def _why_not_fused(self, fuse: passes.FuseSelection, met: Report) -> dict[str, str]:
        if all(isinstance(builder, StaticBuilder) for builder in self.rules.builders):
            return {}  # static tiles have no coarse stage
        notes = {name: f"not fused: {why}" for name, why in fuse.refused.items()}
        hidden = {call.name for call in met.all() if call.sparse} - fuse.fused - notes.keys()
        why = "not fused: the graph shows no coarse stage (it is inside of torch's own multi-head attention, or there is none)"
        return notes | dict.fromkeys(hidden, why)

    def _note_lowering(self, lower: passes.LowerFlex, met: Report) -> None:
        known = {call.name for call in met.all()}
        refused = {name: why for name, why in lower.refused.items() if name in known}
        if self.attention == "triton" and refused:
            name, why = next(iter(refused.items()))
            raise RewriteError(f"attention is 'triton', but the templates cannot do {name}: {why}")
        lowered = {name: code for name, code in lower.lowered.items() if name in known}
        met.annotate(lowered=lowered, notes={name: f"not lowered: {why}" for name, why in refused.items()})
        met.rename_backend("triton", "flex", refused)


def _said_of_order(keep: passes.KeepTiles | None, folded: set[str]) -> dict[str, str]:
    if keep is None:
        return {}
    refused = {
        name: f"tokens {'read in raster order' if name in folded else 'reordered in the call'}: {why}"
        for name, why in keep.refused.items()
    }
    return dict.fromkeys(keep.kept, "tokens stay in tile order") | refused


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    config: dict[str, Any] = dict(list_mode_options(options["mode"])) if options.get("mode") else {}
    config.update(options.get("options") or {})
    return config


def _captures(config: Mapping[str, Any], example_inputs: Sequence[Any]) -> bool:
    """Whether Inductor will make CUDA graphs of what it compiles."""
    from torch._inductor import config as inductor

    wanted = config.get("triton.cudagraphs", inductor.triton.cudagraphs)
    return bool(wanted) and any(isinstance(x, Tensor) and x.is_cuda for x in example_inputs)


def backend(
    builder: Any,
    tile: Sequence[int] | str = (4, 4, 4),
    grid: Sequence[int] | None = None,
    expect: int | None = None,
    **options: Any,
) -> Backend:
    """A torch.compile backend that makes attention over video tokens sparse.

    >>> # not run: needs a model
    >>> model = torch.compile(model, backend=fs.backend(fs.VSA(sparsity=0.9), grid=(21, 30, 52)), fullgraph=True)

    Args:
        builder: a mask builder, or a dict of name patterns to builders (None: dense); the first that matches holds.
        tile: tokens of one tile along (t, h, w), or ``"auto"``.
        grid: the latent token grid (T, H, W).
        expect: how many sparse calls every graph (uncompiled: every forward) must have; None for at least one.
        options: ``text_first``, ``text_last`` (extra tokens in every call), ``query_tile`` (queries in other tiles than keys:
            BSA's (4, 4, 8), of which half are kept, fill 64 rows), ``min_tokens`` (shorter calls stay dense; all of a wrapped
            model then), ``attention`` (``"auto"`` or a backend's name), ``inner`` (``"inductor"``, or ``"aot_eager"`` to leave
            out code generation when debugging), ``fuse_selection``, ``lower_flex``, ``keep_tiles`` and ``fold_tiling`` (off,
            the graph keeps the coarse stage's own nodes, stock FlexAttention, tokens in raster order between calls, or calls
            that bring them to tile order; for comparison).

    Returns:
        The backend; its ``report()`` says what became of every attention call.

    Raises:
        TypeError: an unknown option, or a builder that is none.
        ValueError: an argument out of range.
    """
    if unknown := sorted(options.keys() - OPTIONS):
        raise TypeError(
            f"options has {', '.join(unknown)}: give builder, tile, grid, expect, {', '.join(OPTIONS)}; gates are an argument "
            "of wrap, and dynamic, mode and fullgraph of torch.compile itself"
        )
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
