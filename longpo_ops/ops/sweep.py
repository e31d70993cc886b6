"""One sweep over the head: loss, hidden gradient and head gradient together, in chunks of rows of bounded size.

Every objective without a full-vocabulary KL has the form (docs/mathematics.md)

    L = f(S_1 .. S_K) + sum_t w_t (-logp_t),     S_k = sum of logp_t over the answer rows of sequence k

so row t enters the gradient with one number, g_t = dL / d logp_t = c_k(t) - w_t, where c_k = df / dS_k:

  1. score   answer rows of the groups that do not fit one chunk: S_k                      2 N_a H V
  2. decide  losses and c_k, plain PyTorch on K numbers
  3. sweep   Z = H_c W^T;  Z <- g_t f'(z) (onehot - softmax);  dH_c = Z W;  dW += Z^T H_c  6 N H V

Groups (pairs, say) whose answers fit one chunk are scored, decided and swept in a single visit, the tile waiting in memory
meanwhile. Rows that carry no weight are never read. With no groups this is the weighted cross-entropy.

Scratch: `workspace_bytes`, for any N and batch, beside the inputs, the delivered gradients and the float32 dW (4 H V bytes).
float16: g is scaled by a power of two to at most 1 and the gradients carry `grad_scale`; 1/524288 would drown most of
the softmax otherwise. Its gradients are therefore swept after all groups are decided.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel import Shards
from .objective import Answers, Objective, decide
from .products import SLICE_BYTES, UPCAST_BYTES, Products, is_row_major
from .rows import WINDOW, Chunk, Stretch, chunks, to_device, windows
from .sparse import RULE, sparse_gradient
from .tiles import BLOCK_BYTES, BLOCK_SHARE, NOTHING, Beside, LogitMap, Tiles, empty_tile, predictions

# On CUDA 2.75 GiB: 4,096 rows of the widest common heads, V = 151,936 at H = 4,096 (2.51 GiB) and V = 152,064 at H = 8,192
# (2.70). Fewer rows a chunk would read and write the head's gradient more often: docs/mathematics.md.
DEFAULT_WORKSPACE = {"cpu": 64 << 20, "cuda": 11 << 28}
CUDA_ROWS = 128  # what rows per chunk are a multiple of: the products' tiles have as many


def default_workspace(device: torch.device) -> int:
    """Bytes of scratch when the caller names none: 64 MiB on CPU, 2.75 GiB elsewhere."""
    return DEFAULT_WORKSPACE.get(device.type, DEFAULT_WORKSPACE["cuda"])


def scratch_bytes(
    weight: Tensor, dtype: torch.dtype, tiles: int = 1, native: bool = False, blocks: bool = False, sparse: int = 0
) -> tuple[int, int]:
    """-> fixed bytes, bytes per row: a row costs `tiles` logits rows, its hidden state gathered and converted, and its
    hidden gradient; fixed are the blocks of the tile functions, the host's window of labels and the block of a 16-bit
    weight that a CPU upcasts, unless its products are `native`. `blocks`: the tile functions are the PyTorch form, which
    on other devices than a CPU makes six blocks of a share of the tile. `sparse`: bytes of a sparse hidden gradient."""
    vocab, width = weight.shape
    on_cpu, wide = weight.device.type == "cpu", 8 if dtype == torch.float64 else 4
    upcast = UPCAST_BYTES if on_cpu and weight.dtype.itemsize == 2 and not native else 0
    fixed = 6 * tiles * max(BLOCK_BYTES, vocab * wide) + 64 * WINDOW + tiles * upcast + sparse
    shares = 6 * vocab * wide // BLOCK_SHARE if blocks and not on_cpu else 0
    return fixed, tiles * ((vocab + 32) * wide + shares + width * (2 * dtype.itemsize + 2 * wide) + 64)


def sparse_bytes(weight: Tensor, dtype: torch.dtype, tiles: Tiles) -> int:
    """Of a sparse hidden gradient: the sums of groups, which columns are dropped, and the rows of the head that are gathered,
    on a CPU a block at a time; Triton's product gathers none."""
    (vocab, width), wide = weight.shape, 8 if dtype == torch.float64 else 4
    sums = (RULE.groups + 2) * vocab * wide + 8 * vocab + RULE.groups * width * wide
    if weight.device.type == "cpu":
        return sums + SLICE_BYTES
    gathers = tiles.sparse_gradient is None
    return sums + (int(RULE.most * vocab) * width * weight.element_size() if gathers else 0)


def workspace_of(rows: int, weight: Tensor, dtype: torch.dtype, tiles: int = 1) -> int:
    """Bytes that hold the scratch of so many rows at a time, or of fewer with the PyTorch form on another device than a CPU."""
    fixed, row = scratch_bytes(weight, dtype, tiles)
    return fixed + rows * row


def rows_per_chunk(
    workspace_bytes: int,
    weight: Tensor,
    dtype: torch.dtype,
    tiles: int = 1,
    native: bool = False,
    blocks: bool = False,
    sparse: int = 0,
) -> int:
    """Rows whose scratch fits in workspace_bytes, at least 1; a multiple of the device's row_unit where that many fit."""
    fixed, row = scratch_bytes(weight, dtype, tiles, native, blocks, sparse)
    rows, unit = max(1, (workspace_bytes - fixed) // row), row_unit(weight.device)
    return rows if rows < unit else rows // unit * unit


def row_unit(device: torch.device) -> int:
    """What rows per chunk should be a multiple of."""
    return 1 if device.type == "cpu" else CUDA_ROWS


@dataclass(frozen=True)
class Options:
    """How the head is read, the same for every op: one object instead of seven parameters."""

    scale: float
    softcap: float
    workspace_bytes: int
    compute_dtype: torch.dtype
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    sparse: bool = False  # the hidden gradient, from the columns that matter (sparse.py)

    @property
    def need_any(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias


class Held(NamedTuple):
    """A scored chunk waiting for its weights."""

    chunk: Chunk
    h: Tensor
    labels: Tensor
    z: Tensor
    stats: Tensor


class HeadSweep:
    """The head on its way over the rows: products, tile functions, one tile of memory and the gradients it gathers."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tiles: Tiles, options: Options, rows: int):
        self.products = Products(weight, options.compute_dtype, tiles.name)
        self.tiles, self.options, self.rows = tiles, options, rows
        self.map = LogitMap(bias if bias is None else bias.contiguous(), options.scale, options.softcap)
        self.vocab, self.device, self.dtype = weight.shape[0], weight.device, self.products.tile_dtype
        contiguous = torch.contiguous_format
        self.dw = torch.empty_like(weight, dtype=self.dtype, memory_format=contiguous) if options.need_weight else None
        if self.dw is not None and tiles.name == "cpu":
            torch.ops.longpo_cpu.large_pages(self.dw)
        self.gathered = False  # until then dw holds nothing
        self.db = torch.zeros_like(bias, dtype=torch.float64) if options.need_bias else None  # many chunks, few numbers

    def chunks(self, places: list[tuple[Stretch, int]], select) -> Iterator[Chunk]:
        """The selected rows of these windows, at most as many at a time as the tile has."""
        return chunks(places, select, self.rows, row_unit(self.device))

    @functools.cached_property
    def tile(self) -> Tensor:
        tile = empty_tile(self.rows, self.vocab, self.device, self.dtype)
        if self.tiles.name == "cpu":
            torch.ops.longpo_cpu.large_pages(tile)
        return tile

    def _logits(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        h = chunk.hidden(self.products.dtype)
        labels = to_device(chunk.labels(), self.device)
        return h, labels, self.products.logits_(h, self.tile[: h.shape[0]])

    def logps(self, chunk: Chunk) -> Tensor:
        """(n,) log-probs alone."""
        return self.stats(chunk)[0]

    def stats(self, chunk: Chunk, beside: Beside = NOTHING) -> tuple[Tensor, Tensor]:
        """(n,) log-probs and stats alone. What is asked for beside needs the tile, whatever the back-end."""
        weight, straight = self.products.weight, self.tiles.linear_logps is not None and beside.columns == 2
        if not straight or self.products.blockwise or not is_row_major(weight):
            h, labels, z = self._logits(chunk)
            return self.tiles.logps(z, labels, self.map, beside)
        h, labels = chunk.hidden(self.products.dtype), to_device(chunk.labels(), self.device)
        return self.tiles.linear_logps(h, weight, labels, self.map)

    def score(self, chunk: Chunk, beside: Beside = NOTHING, affine: bool = False) -> tuple[Tensor, Held]:
        """(n,) log-probs, and the tile they came from; `affine`: for a gradient of the affine family."""
        h, labels, z = self._logits(chunk)
        logps, stats = self.tiles.logps(z, labels, self.map, beside)
        return logps, Held(chunk, h, labels, z, stats)

    def push(self, held: Held, g: Tensor, classes: Tensor | None = None) -> None:
        """Gradients of a scored chunk; g (n,), or (n, 4) of the affine family."""
        dz = self.tiles.gradient_(held.z, held.labels, held.stats, g, self.map, self.products.dtype, classes)
        self._gather(held.chunk, held.h, dz)

    def visit(self, chunk: Chunk, g: Tensor) -> Tensor:
        """(n,) log-probs and gradients of a chunk whose weights are known."""
        h, labels, z = self._logits(chunk)
        logps, dz = self.tiles.logps_gradient_(z, labels, g, self.map, self.products.dtype)
        self._gather(chunk, h, dz)
        return logps

    def _gather(self, chunk: Chunk, h: Tensor, dz: Tensor) -> None:
        if self.dw is not None:
            self.products.add_weight_gradient_(self.dw, dz, h, not self.gathered)
            self.gathered = True
        if self.db is not None:
            self.db.add_(dz.sum(0, dtype=self.dtype))
        if self.options.need_hidden:  # last: with reuse_hidden this overwrites what h may be a view of
            chunk.write(hidden_gradient(dz, self.products, self.tiles, self.options.sparse))

    def weight_gradient(self) -> Tensor | None:
        """(V, H) in the tile's dtype; zeros where no row had a weight."""
        return self.dw if self.dw is None or self.gathered else self.dw.zero_()


def hidden_gradient(dz: Tensor, products: Products, tiles: Tiles, sparse: bool) -> Tensor:
    """dz (n, V) -> (n, H); a sparse one overwrites dz."""
    if not sparse:
        return products.hidden_gradient(dz)
    if tiles.sparse_gradient is None:
        return sparse_gradient(dz, products)
    return tiles.sparse_gradient(dz, products, RULE)


class Groups(NamedTuple):
    """What the K answer sequences are to each other."""

    objective: Objective
    refs: Tensor | None  # (K,) on the device
    group: Tensor  # (K,) int64, host
    role: Tensor  # (K,) int64, host
    count: int  # G
    lengths: Tensor  # (K,) int64, host: answer tokens of each sequence, those on other ranks included
    weight: float  # preference_weight / num_groups: what a group's loss counts in the total
    correct: bool = False  # whether answer tokens that are predicted are counted


class Result(NamedTuple):
    """Sums in float64; `grad_scale` divides every gradient (1 but for float16)."""

    losses: Tensor  # (G,) preference losses
    nll: Tensor  # () sum of w_t * -logp_t
    sums: Tensor  # (K,) summed log-probs
    rewards: Tensor  # (K,)
    correct: Tensor  # (K,) answer tokens that are predicted; 0 where they are not counted
    dw: Tensor | None
    db: Tensor | None
    grad_scale: Tensor


def sweep(
    stretches: list[Stretch], head: HeadSweep, groups: Groups | None, nll_total: Tensor, shards: Shards | None = None
) -> Result:
    """Loss and gradients of all rows in one sweep; gradients of hidden go to each stretch's `grad`. NLL weights are
    divided by nll_total (); nothing is divided by 0. shards: the stretches are this rank's part of the rows."""
    return _Sweep(stretches, head, groups, nll_total, shards).run()


class _Sweep:
    def __init__(
        self,
        stretches: list[Stretch],
        head: HeadSweep,
        groups: Groups | None,
        nll_total: Tensor,
        shards: Shards | None,
    ):
        self.stretches, self.head, self.groups, self.shards = stretches, head, groups, shards
        double = functools.partial(torch.zeros, device=head.device, dtype=torch.float64)
        k, g = (0, 0) if groups is None else (groups.group.shape[0], groups.count)
        self.slopes, self.rewards, self.losses, self.nll, self.told = map(double, (k, k, g, 1, (2, k)))
        self.sums, self.correct = self.told  # of each sequence, over the ranks together
        self.beside = Beside(predicted=groups is not None and groups.correct)
        nll_total = to_device(nll_total, head.device, torch.float64)
        self.nll_scale = torch.where(nll_total != 0, 1 / nll_total, 0.0)
        self.windows = windows(stretches)
        self.found = [[] for _ in range(k)]  # the windows that hold answer rows of each sequence
        self.grad_scale = torch.ones((), device=head.device)

    def run(self) -> Result:
        visits, large = self._plan()
        wants_gradient = self.head.options.need_any
        visited = torch.zeros_like(large)
        if bool(large.any()):
            for chunk in self.head.chunks(self._windows_of(large), self._answers_of(large)):
                logps, stats = self.head.stats(chunk, self.beside)
                self._add_sums(chunk, logps, stats)
                if not wants_gradient:
                    self._add_nll(chunk, logps)
            self._add_ranks(self.told if self.beside.predicted else self.sums)
            self._decide(large)
            visited = visited if wants_gradient else large
        if self.head.options.compute_dtype == torch.float16 and wants_gradient:
            self.grad_scale = self._float16_scale()
        for sequences in visits:
            visited = visited | sequences
            (chunk,) = self.head.chunks(self._windows_of(sequences), self._answers_of(sequences))
            self._visit_groups(chunk, sequences, wants_gradient)
        for chunk in self.head.chunks(self.windows, self._rest(visited)):
            logps = self.head.visit(chunk, self._weights(chunk)) if wants_gradient else self.head.logps(chunk)
            self._add_nll(chunk, logps)
        if any(stretch.nll is not None for stretch in self.stretches):
            self._add_ranks(self.nll)
        return Result(
            self.losses,
            self.nll[0],
            self.sums,
            self.rewards,
            self.correct,
            self.head.weight_gradient(),
            self.head.db,
            self.grad_scale,
        )

    def _visit_groups(self, chunk: Chunk, sequences: Tensor, wants_gradient: bool) -> None:
        """Score, decide and sweep all answers of some groups while their tile waits."""
        if not wants_gradient:
            logps, stats = self.head.stats(chunk, self.beside)
        else:
            logps, held = self.head.score(chunk, self.beside)
            stats = held.stats
        self._add_sums(chunk, logps, stats)
        self._add_nll(chunk, logps)
        self._decide(sequences)
        if wants_gradient:
            self.head.push(held, self._weights(chunk))

    # -- plan: host integers only ------------------------------------------------------------------------------------

    def _plan(self) -> tuple[list[Tensor], Tensor]:
        """-> sequences swept in a single visit, a mask (K,) per visit; and the mask of those scored first."""
        everything = torch.ones(len(self.found), dtype=torch.bool)
        if self.groups is None or not everything.shape[0]:
            return [], ~everything
        self._find()
        single_visit = self.groups.objective.separable and self.head.options.compute_dtype != torch.float16
        if not single_visit or self.shards is not None:  # what other ranks have scored comes before what is decided
            return [], everything
        group_of = self.groups.group
        rows = torch.zeros(self.groups.count, dtype=torch.int64).index_add_(0, group_of, self.groups.lengths)
        visits, visit, room, large = [], [], 0, []
        for group, n in enumerate(rows.tolist()):
            if n > self.head.rows:
                large.append(group)
                continue
            if n > room:
                visits.append(visit := [])
                room = self.head.rows
            visit.append(group)
            room -= n
        return [torch.isin(group_of, torch.tensor(v)) for v in visits], torch.isin(group_of, torch.tensor(large))

    def _find(self) -> None:
        for number, (stretch, start) in enumerate(self.windows):
            segments = stretch.segments_at(slice(start, start + WINDOW))
            for k in torch.bincount(segments + 1)[1:].nonzero().squeeze(-1).tolist():
                self.found[k].append(number)

    def _windows_of(self, wanted: Tensor) -> list[tuple[Stretch, int]]:
        """The windows that hold answers of these sequences: many pairs must not look through all of them each."""
        numbers = {number for k in wanted.nonzero().squeeze(-1).tolist() for number in self.found[k]}
        return [self.windows[number] for number in sorted(numbers)]

    def _answers_of(self, wanted: Tensor):
        def select(stretch: Stretch, window: slice) -> Tensor:
            segments = stretch.segments_at(window)
            return (segments >= 0) & wanted[segments.clamp(min=0)]

        return select

    def _rest(self, visited: Tensor):
        """Rows with any weight that are no answers of visited sequences."""

        def select(stretch: Stretch, window: slice) -> Tensor:
            segments, nll = stretch.segments_at(window), stretch.nll_mask(window)
            if not visited.shape[0]:
                return nll
            answer, done = segments >= 0, visited[segments.clamp(min=0)]
            return torch.where(answer, ~done, nll)

        return select

    # -- numbers on the device ---------------------------------------------------------------------------------------

    def _add_ranks(self, numbers: Tensor) -> None:
        """Adds those of the other ranks in place; every rank comes here, whatever rows it has."""
        if self.shards is not None:
            self.shards.sum_(numbers)

    def _add_sums(self, chunk: Chunk, logps: Tensor, stats: Tensor) -> None:
        segments = to_device(chunk.segments(), self.head.device)
        self.head.tiles.segment_sums(logps, segments, self.sums)
        if self.beside.predicted:
            labels = to_device(chunk.labels(), self.head.device)
            self.head.tiles.segment_sums((predictions(stats) == labels).to(stats.dtype), segments, self.correct)

    def _add_nll(self, chunk: Chunk, logps: Tensor) -> None:
        weights = chunk.nll_weights(self.head.device, logps.dtype)
        carried = torch.where(weights != 0, logps, 0.0).double() * -weights.double()
        self.nll.add_(carried.sum() * self.nll_scale)

    def _weights(self, chunk: Chunk) -> Tensor:
        """g (n,) = c_k - w_t, in the tile's dtype."""
        dtype = self.head.dtype
        g = -chunk.nll_weights(self.head.device, torch.float64) * self.nll_scale
        if self.groups is not None:
            segments = to_device(chunk.segments(), self.head.device)
            g = g + torch.cat([self.slopes, self.slopes.new_zeros(1)])[segments]
        return (g * self.grad_scale).to(dtype)

    def _decide(self, sequences: Tensor) -> None:
        """Losses, rewards and slopes of the groups whose sequences are in the mask (K,)."""
        groups, device = self.groups, self.head.device
        here = sequences.nonzero().squeeze(-1)
        numbers, group = torch.unique(groups.group[here], return_inverse=True)
        k, lengths, numbers = (to_device(t, device) for t in (here, groups.lengths[here].double(), numbers))
        logps = torch.where(self.sums.isfinite(), self.sums, torch.nan)[k]  # NaN: a saturated loss would hide the other
        refs = None if groups.refs is None else groups.refs[k]
        decision = decide(
            groups.objective, Answers.of(logps, lengths, refs, group, groups.role[here], numbers.shape[0])
        )
        self.losses[numbers], self.rewards[k] = decision.losses, decision.rewards
        self.slopes[k] = decision.slopes * groups.weight

    def _float16_scale(self) -> Tensor:
        """Brings max |g| near 1: |g| <= max |c_k| + max |w_t|."""
        bound = self.slopes.abs().amax() if self.slopes.shape[0] else self.nll.new_zeros(())
        for stretch in self.stretches:
            if stretch.nll is not None and stretch.nll_weights.shape[0]:
                largest = to_device(stretch.nll_weights.abs().amax(), bound.device, bound.dtype)
                bound = torch.maximum(bound, largest * self.nll_scale.abs())
        return float16_scale(bound)


def float16_scale(bound: Tensor) -> Tensor:
    """() -> the power of two, float32, that brings `bound` to [1/2, 1); 1 when it is zero or not finite."""
    bound = bound.double()
    usable = torch.isfinite(bound) & (bound > 0)
    return torch.where(usable, torch.ldexp(torch.ones_like(bound), -torch.frexp(bound).exponent), 1.0).float()
