"""ChunkIndex: the chunks of one layer's KV cache, kept up to date while the cache grows.

    prefill(k)       cuts Lk keys into chunks as stages 1 and 2 do
    extend(k_new)    appends keys: they form an open tail, which belongs to no chunk, so decode always keeps them;
                     the tail's head becomes a chunk when a cut is decided

Cuts are decided in order of position, and t only once key t + window - 1 has come: cut if t - start > nms_radius and
score(t) is above the lowest score accepted in that row's prefill (+inf if none was), or if t - start is 64. A score
reads exactly its own 2 * window keys and a chunk's sum exactly its own keys, so the result depends on the keys alone,
bit for bit, not on how the calls of `extend` split them.
"""

from __future__ import annotations

import math

import torch

from . import ops
from .config import MAX_OPEN_CHUNK


class ChunkIndex:
    """Chunks of a cache k [B, Hkv, Lk, D], for ops.sparse_decode.

    heads           S, selection heads of the chunk vectors: 1, Hkv or a multiple that the query heads fit
    scale           "sqrt", "mean" or "sum": the scaling of `pooled` ("mean" for score "mass")
    chunk_size      prefill cuts at most max(1, Lk // chunk_size) chunks
    segment         0, or prefill also cuts at every multiple of it, each segment with a quota of its own
    nms_radius      tokens; less than 64, the longest open chunk
    boundary_window, threshold    as in ops.boundary_scores and ops.select_boundaries
    """

    def __init__(
        self,
        heads: int,
        scale: str = "sqrt",
        *,
        chunk_size: int = 16,
        nms_radius: int = 8,
        boundary_window: int = 4,
        threshold: float | None = None,
        segment: int = 0,
    ) -> None:
        if not 0 <= nms_radius < MAX_OPEN_CHUNK:
            raise ValueError(f"dhsa_ext.ChunkIndex: nms_radius: expected 0 to {MAX_OPEN_CHUNK - 1}, got {nms_radius}")
        if scale not in ("sqrt", "mean", "sum"):
            raise ValueError(f"dhsa_ext.ChunkIndex: scale: expected 'sqrt', 'mean' or 'sum', got {scale!r}")
        for name, value in (("heads", heads), ("chunk_size", chunk_size), ("boundary_window", boundary_window)):
            if value < 1:
                raise ValueError(f"dhsa_ext.ChunkIndex: {name}: expected at least 1, got {value}")
        self.heads, self.scale, self.chunk_size = heads, scale, chunk_size
        self.nms_radius, self.window, self.threshold = nms_radius, boundary_window, threshold
        self.segment = segment
        self.length = 0  # keys seen

    def prefill(
        self, k: torch.Tensor, offsets: torch.Tensor | None = None, num_chunks: torch.Tensor | None = None
    ) -> None:
        """Start anew from the keys k [B, Hkv, Lk, D]. Given offsets and num_chunks (another layer's) replace the
        cuts, not the scores: the tail is still cut by this layer's own keys.
        """
        if (offsets is None) != (num_chunks is None):
            raise ValueError("dhsa_ext.ChunkIndex.prefill: offsets, num_chunks: expected both or neither, got one")
        scores = ops.boundary_scores(k, self.window)
        if offsets is None or num_chunks is None:
            quota = max(1, (self.segment or k.shape[2]) // self.chunk_size)
            offsets, num_chunks = ops.select_boundaries(scores, quota, self.nms_radius, self.threshold, self.segment)
        self.length = k.shape[2]
        # Interior cuts are the accepted candidates; the lowest of their scores is the bar for later cuts.
        columns = torch.arange(offsets.shape[1], device=k.device)
        interior = (columns > 0) & (columns < num_chunks[:, None])
        if self.segment:
            interior &= offsets % self.segment != 0  # a forced cut was accepted by no score
        padded = torch.cat([scores, scores.new_full((scores.shape[0], 1), math.inf)], dim=1)
        accepted = padded.gather(1, offsets.long().clamp(max=self.length)).masked_fill(~interior, math.inf)
        self._lowest = accepted.amin(dim=1)
        self._bars: list[float] = []  # `_lowest` and `num_chunks` on the host, from the first extend on: a prefill
        self._counts: list[int] = []  # does not wait for the device
        self._starts: list[int] = [self.length] * k.shape[0]  # of each row's open chunk
        self._decided = [self.length] * k.shape[0]  # cuts below this position are settled
        self._offsets = offsets.clone()
        self._sums = ops.chunk_pool(k, offsets, num_chunks, self.heads, "sum")
        self._num_chunks = num_chunks.clone()
        self._pooled = ops.chunk_pool(k, offsets, num_chunks, self.heads, self.scale)
        self._recent_begin = max(0, self.length - self.window)
        self._recent = k[:, :, self._recent_begin :].clone()  # the keys that later scores and sums may read

    def extend(self, k_new: torch.Tensor) -> None:
        """Append the keys k_new [B, Hkv, n, D] to the open tail; close the chunks whose cuts are now decided."""
        if not hasattr(self, "_sums"):
            raise RuntimeError("dhsa_ext.ChunkIndex.extend: expected a prefill before it, got none")
        expected = (self._recent.shape[0], self._recent.shape[1], self._recent.shape[3])
        if k_new.ndim != 4 or (k_new.shape[0], k_new.shape[1], k_new.shape[3]) != expected:
            b, heads, dim = expected
            raise ValueError(
                f"dhsa_ext.ChunkIndex.extend: k_new: expected [{b}, {heads}, n, {dim}], got {list(k_new.shape)}"
            )
        if not self._bars:
            self._bars, self._counts = self._lowest.tolist(), self._num_chunks.tolist()
        self._recent = torch.cat([self._recent, k_new], dim=2)
        self.length += k_new.shape[2]
        scores = self._window_scores()
        for row in range(len(self._starts)):
            self._close_chunks(row, scores)
        keep = max(0, min(min(self._starts), self.length - self.window + 1) - self.window)
        if keep > self._recent_begin:
            self._recent = self._recent[:, :, keep - self._recent_begin :].clone()
            self._recent_begin = keep

    def crop(self, length: int) -> None:
        raise NotImplementedError(f"dhsa_ext.ChunkIndex.crop({length}): chunks cannot be cut back; call prefill again")

    def reorder(self, rows: torch.Tensor) -> None:
        raise NotImplementedError("dhsa_ext.ChunkIndex.reorder: rows cannot be permuted; call prefill again")

    @property
    def offsets(self) -> torch.Tensor:
        """int32 [B, C + 1]: chunk c holds keys offsets[c] to offsets[c + 1]; from num_chunks on, the tail's start."""
        return self._offsets

    @property
    def num_chunks(self) -> torch.Tensor:
        """int32 [B]"""
        return self._num_chunks

    @property
    def sums(self) -> torch.Tensor:
        """float32 [B, S, C, D]: the sum of each chunk's keys; 0 from num_chunks on."""
        return self._sums

    @property
    def pooled(self) -> torch.Tensor:
        """float32 [B, S, C, D]: `sums`, scaled: the k_pooled of ops.sparse_decode."""
        return self._pooled

    @property
    def tail_starts(self) -> torch.Tensor:
        """int32 [B]: the first key of no chunk."""
        return self._offsets.gather(1, self._num_chunks[:, None].long())[:, 0]

    @property
    def bars(self) -> torch.Tensor:
        """float32 [B]: the score above which a tail is cut."""
        return self._lowest

    def _window_scores(self) -> dict[int, list[float]]:
        """Scores of every row at each position that is new, whose windows are complete, and that some row may cut."""
        first = min(max(d, s + self.nms_radius + 1) for d, s in zip(self._decided, self._starts, strict=True))
        # The first cut of a row can move its start forward only, so positions before `first` are never asked for.
        first, last = max(first, self.window), self.length - self.window
        if first > last:
            return {}
        batch, heads, _, dim = self._recent.shape
        begin = first - self.window - self._recent_begin
        windows = self._recent[:, :, begin:].unfold(2, 2 * self.window, 1)  # [B, Hkv, n, D, 2 window]
        windows = windows.permute(0, 2, 1, 4, 3).reshape(-1, heads, 2 * self.window, dim)
        scores = ops.boundary_scores(windows, self.window)[:, self.window].reshape(batch, -1).T.tolist()
        return dict(zip(range(first, last + 1), scores, strict=True))

    def _close_chunks(self, row: int, scores: dict[int, list[float]]) -> None:
        # From the tail's start on, not from nms_radius on: a position's turn comes even where no cut is possible.
        for t in range(self._decided[row], self.length - self.window + 1):
            open_length = t - self._starts[row]
            above = open_length > self.nms_radius and t >= self.window and scores[t][row] > self._bars[row]
            if above or open_length == MAX_OPEN_CHUNK:
                self._append_chunk(row, t)
        self._decided[row] = max(self._decided[row], self.length - self.window + 1)

    def _append_chunk(self, row: int, end: int) -> None:
        start, column = self._starts[row], self._counts[row]
        if column == self._sums.shape[2]:
            self._grow()
        keys = self._recent[row : row + 1, :, start - self._recent_begin : end - self._recent_begin]
        offsets = torch.tensor([[0, end - start]], dtype=torch.int32, device=keys.device)
        one = torch.ones(1, dtype=torch.int32, device=keys.device)
        self._sums[row, :, column] = ops.chunk_pool(keys, offsets, one, self.heads, "sum")[0, :, 0]
        self._pooled[row, :, column] = ops.chunk_pool(keys, offsets, one, self.heads, self.scale)[0, :, 0]
        self._offsets[row, column] = start
        self._offsets[row, column + 1 :] = end
        self._num_chunks[row] = self._counts[row] = column + 1
        self._starts[row] = end

    def _grow(self) -> None:
        """Room for half as many chunks again, at least 16."""
        extra = max(16, self._sums.shape[2] // 2)
        self._sums = torch.nn.functional.pad(self._sums, (0, 0, 0, extra))
        self._pooled = torch.nn.functional.pad(self._pooled, (0, 0, 0, extra))
        self._offsets = torch.cat([self._offsets, self._offsets[:, -1:].expand(-1, extra)], dim=1)
