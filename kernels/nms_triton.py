"""Non-maximum suppression on a GPU: the result of kernels.nms for a batch of images, without waiting for the host.

As in the specification, candidates are taken in blocks. A block is BLOCK candidates of every image:

    _usable_kernel    marks the rows that are candidates; the device then sorts their scores
    _gather_kernel    copies boxes and labels in that order (this and the first kernel: batched_nms only)
    _compare_kernel   compares a block with itself: for each candidate, a bit for each better one that suppresses it
    _settle_kernel    finds the survivors of the block: one program per image, 64 candidates at a time
    _spread_kernel    compares every later candidate with the survivors of the block

No tensor has the square of the number of boxes, a suppressed candidate is not compared again, and an image with
`max_detections` survivors needs no further work. The arithmetic is bit for bit that of the specification (float32 in
the same order, a correctly rounded division, no fused multiply-add), so the kept set is the same.
"""

import torch
from torch import Tensor

from kernels.backend import HAS_TRITON
from layers.precision import compute_dtype
from structures import Detections

BLOCK = 2048  # candidates: enough work to hide three launches, few enough for one program to settle
WORD = 64  # bits
COLUMNS = 32  # candidates that one program compares with others; at most WORD
ROWS = 256  # of one program of _usable_kernel and _gather_kernel
NO_CANDIDATE = torch.iinfo(torch.int64).min  # the key of a row that is not a candidate

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _corners(boxes_ptr, i, count, is_loaded):
        x1 = tl.load(boxes_ptr + i, mask=is_loaded, other=0.0)
        y1 = tl.load(boxes_ptr + count + i, mask=is_loaded, other=0.0)
        x2 = tl.load(boxes_ptr + 2 * count + i, mask=is_loaded, other=0.0)
        y2 = tl.load(boxes_ptr + 3 * count + i, mask=is_loaded, other=0.0)
        return x1, y1, x2, y2

    @triton.jit
    def _is_suppressed(boxes_ptr, labels_ptr, i, is_i, j, is_j, count, threshold):
        # (I, J): whether i suppresses j if i is kept. The kernels are compiled without fused multiply-add.
        ix1, iy1, ix2, iy2 = _corners(boxes_ptr, i, count, is_i)
        jx1, jy1, jx2, jy2 = _corners(boxes_ptr, j, count, is_j)
        i_area = (ix2 - ix1) * (iy2 - iy1)
        j_area = (jx2 - jx1) * (jy2 - jy1)
        width = tl.minimum(ix2[:, None], jx2[None, :]) - tl.maximum(ix1[:, None], jx1[None, :])
        height = tl.minimum(iy2[:, None], jy2[None, :]) - tl.maximum(iy1[:, None], jy1[None, :])
        intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        iou = tl.div_rn(intersection, i_area[:, None] + j_area[None, :] - intersection)
        i_label = tl.load(labels_ptr + i, mask=is_i, other=0)
        j_label = tl.load(labels_ptr + j, mask=is_j, other=0)
        return (iou > threshold) & (i_label[:, None] == j_label[None, :]) & is_i[:, None] & is_j[None, :]

    @triton.jit
    def _usable_kernel(
        boxes_ptr, scores_ptr, usable_ptr, count, box_row, box_corner, score_row, ROWS: tl.constexpr
    ):  # fmt: skip
        # The scores; -inf if a number of the row is not finite. -0 becomes 0: a sort by bits would separate them.
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        score = tl.load(scores_ptr + i * score_row, mask=i < count, other=0.0).to(usable_ptr.dtype.element_ty)
        is_finite = tl.abs(score) < float("inf")
        for corner in tl.static_range(4):
            x = tl.load(boxes_ptr + i * box_row + corner * box_corner, mask=i < count, other=0.0).to(tl.float64)
            is_finite = is_finite & (tl.abs(x) < float("inf"))
        score = tl.where(score == 0, 0.0, score)
        tl.store(usable_ptr + i, tl.where(is_finite, score, float("-inf")), mask=i < count)

    @triton.jit
    def _gather_kernel(
        boxes_ptr, labels_ptr, order_ptr, usable_ptr, gathered_ptr, gathered_labels_ptr, lost_ptr, count,
        box_row, box_corner, label_row, ROWS: tl.constexpr,
    ):  # fmt: skip
        # Boxes (corner by corner) and labels, best first. lost: not a candidate, or suppressed later.
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        is_row = i < count
        row = tl.load(order_ptr + i, mask=is_row, other=0)
        for corner in tl.static_range(4):
            x = tl.load(boxes_ptr + row * box_row + corner * box_corner, mask=is_row, other=0.0)
            tl.store(gathered_ptr + corner * count + i, x.to(tl.float32), mask=is_row)
        label = tl.load(labels_ptr + row * label_row, mask=is_row, other=0)
        tl.store(gathered_labels_ptr + i, label.to(tl.int32), mask=is_row)
        is_lost = tl.load(usable_ptr + i, mask=is_row, other=0.0) == float("-inf")
        tl.store(lost_ptr + i, is_lost.to(tl.int32), mask=is_row)

    @triton.jit(do_not_specialize=["block"])
    def _compare_kernel(
        boxes_ptr, labels_ptr, lost_ptr, survivors_ptr, bits_ptr, block, count, limit, threshold,
        BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        # Bit i of bits[image, word, j]: candidate 64 word + i of the block comes before j and would suppress it.
        image = tl.program_id(0).to(tl.int64)
        word = tl.program_id(1)
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        is_full = tl.load(survivors_ptr + image) >= limit
        j = block * BLOCK + column
        is_j = tl.load(lost_ptr + image * count + j, mask=j < count, other=1) == 0
        # Bits that are never read are not written: of later words, lost candidates, images with enough survivors.
        if (word * 64 < (tl.program_id(2) + 1) * COLUMNS) & (is_full == 0) & (tl.max(is_j.to(tl.int32), 0) == 1):
            member = tl.arange(0, 64)
            i = block * BLOCK + word * 64 + member
            is_i = i < count
            suppressed = _is_suppressed(
                boxes_ptr + image * 4 * count, labels_ptr + image * count, i, is_i, j, is_j, count, threshold
            )
            suppressed = suppressed & (i[:, None] < j[None, :])
            bits = tl.sum(suppressed.to(tl.int64) << member[:, None].to(tl.int64), 0)
            tl.store(bits_ptr + (image * (BLOCK // 64) + word) * BLOCK + column, bits)

    @triton.jit(do_not_specialize=["block"])
    def _settle_kernel(
        lost_ptr, bits_ptr, survivors_ptr, before_ptr, kept_ptr, block, count, limit,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        # keep(j) = not lost(j) and no kept i before j suppresses it, 64 candidates at a time. Among those 64 this is
        # iterated until nothing changes, as in kernels.nms._settle: at most once per member of the longest chain.
        image = tl.program_id(0).to(tl.int64)
        survivors = tl.load(survivors_ptr + image)
        tl.store(before_ptr + image, survivors)
        if survivors < limit:
            words = tl.arange(0, BLOCK // 64)
            member = tl.arange(0, 64)
            one = (member * 0 + 1).to(tl.int64) << member.to(tl.int64)
            kept = tl.zeros((BLOCK // 64,), tl.int64)
            for word in range(tl.minimum(BLOCK // 64, tl.cdiv(count - block * BLOCK, 64))):
                place = word * 64 + member
                j = block * BLOCK + place
                bits_at = bits_ptr + (image * (BLOCK // 64) + words[:, None]) * BLOCK + place[None, :]
                bits = tl.load(bits_at, mask=(words <= word)[:, None], other=0)  # (BLOCK / 64, 64)
                is_free = tl.load(lost_ptr + image * count + j, mask=j < count, other=1) == 0
                is_free = is_free & (tl.max(((bits & kept[:, None]) != 0).to(tl.int32), 0) == 0)
                suppressors = tl.sum(tl.where((words == word)[:, None], bits, 0), 0)  # (64,): bits among the 64
                keep = tl.sum(tl.where(is_free, one, 0), 0)
                previous = ~keep
                while keep != previous:
                    previous = keep
                    keep = tl.sum(tl.where(is_free & ((suppressors & keep) == 0), one, 0), 0)
                kept = tl.where(words == word, keep, kept)
                is_kept = ((keep & one) != 0).to(tl.int32)
                rank = survivors + tl.cumsum(is_kept, 0) - 1
                tl.store(kept_ptr + image * limit + rank, j, mask=(is_kept != 0) & (rank < limit))
                survivors += tl.sum(is_kept, 0)
            tl.store(survivors_ptr + image, tl.minimum(survivors, limit))

    @triton.jit(do_not_specialize=["block"])
    def _spread_kernel(
        boxes_ptr, labels_ptr, lost_ptr, survivors_ptr, before_ptr, kept_ptr, block, count, limit, threshold,
        BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        image = tl.program_id(1).to(tl.int64)
        j = (block + 1) * BLOCK + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        before = tl.load(before_ptr + image)
        after = tl.load(survivors_ptr + image)
        is_lost = tl.load(lost_ptr + image * count + j, mask=j < count, other=1)
        if (after < limit) & (tl.min(is_lost, 0) == 0):
            for start in range(before, after, 64):
                rank = start + tl.arange(0, 64)
                i = tl.load(kept_ptr + image * limit + rank, mask=rank < after, other=0)
                suppressed = _is_suppressed(
                    boxes_ptr + image * 4 * count, labels_ptr + image * count,
                    i, rank < after, j, is_lost == 0, count, threshold,
                )  # fmt: skip
                is_lost = tl.maximum(is_lost, tl.max(suppressed.to(tl.int32), 0))
            tl.store(lost_ptr + image * count + j, is_lost, mask=j < count)


def suppress(
    boxes_xyxy: Tensor, labels: Tensor, is_candidate: Tensor, threshold: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """Suppression in B images of N candidates each, best first: indices (B, M) int32 and counts (B,) of the survivors.

    boxes_xyxy (B, N, 4), labels (B, N), is_candidate (B, N); threshold is a float32 number; M = min(max_detections, N).
    Row b of the indices holds the survivors of image b, best first; entries after its count are undefined.
    """
    boxes = boxes_xyxy.float().transpose(1, 2).contiguous()  # (B, 4, N)
    return _walk(boxes, labels.int().contiguous(), (~is_candidate).int(), threshold, max_detections)


def _walk(boxes: Tensor, labels: Tensor, lost: Tensor, threshold: float, max_detections: int) -> tuple[Tensor, Tensor]:
    """`suppress` for boxes (B, 4, N) float32, labels (B, N) int32 and lost (B, N) int32, not 0 for no candidate."""
    images, count = labels.shape
    limit = min(max_detections, count)
    kept = torch.empty(images, limit, dtype=torch.int32, device=labels.device)
    survivors = torch.zeros(images, dtype=torch.int32, device=labels.device)
    if kept.numel() == 0:
        return kept, survivors
    before = torch.empty_like(survivors)
    block_size = min(BLOCK, max(WORD, triton.next_power_of_2(count)))
    bits = torch.empty(images, block_size // WORD, block_size, dtype=torch.int64, device=labels.device)
    exact = dict(BLOCK=block_size, enable_fp_fusion=False)
    compared = exact | dict(COLUMNS=COLUMNS)
    with torch.cuda.device_of(boxes):
        for block in range(triton.cdiv(count, block_size)):
            tiles = (images, block_size // WORD, block_size // COLUMNS)
            _compare_kernel[tiles](boxes, labels, lost, survivors, bits, block, count, limit, threshold, **compared)
            _settle_kernel[(images,)](lost, bits, survivors, before, kept, block, count, limit, **exact)
            left = count - (block + 1) * block_size
            if left > 0:
                later_tiles = (triton.cdiv(left, COLUMNS), images)  # only the first may exceed 65,535
                _spread_kernel[later_tiles](
                    boxes, labels, lost, survivors, before, kept, block, count, limit, threshold, **compared
                )
    return kept, survivors


def batched_nms_triton(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int
) -> Tensor:
    """The contract of kernels.nms.batched_nms. The host waits once, for the number of survivors.

    Two kernels beside the sort replace thirty operations of PyTorch; for a thousand boxes launching those would take
    most of the time.
    """
    order, boxes, sorted_labels, lost = in_order(boxes_xyxy, scores, labels)
    kept, survivors = _walk(boxes[None], sorted_labels[None], lost[None], threshold, max_detections)
    return order[kept[0, : survivors.item()]]


def in_order(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, 4), (N,), (N,) -> rows (N,) by falling score; boxes (4, N), labels (N,) and lost (N,) in that order."""
    count, device = len(scores), scores.device
    usable = torch.empty(count, dtype=compute_dtype(scores), device=device)
    boxes = torch.empty(4, count, dtype=torch.float32, device=device)
    sorted_labels, lost = torch.empty(2, count, dtype=torch.int32, device=device)
    grid = (triton.cdiv(count, ROWS),)
    with torch.cuda.device_of(boxes):
        if count:
            _usable_kernel[grid](boxes_xyxy, scores, usable, count, *boxes_xyxy.stride(), *scores.stride(), ROWS=ROWS)
        usable, order = usable.sort(stable=True, descending=True)
        if count:
            _gather_kernel[grid](
                boxes_xyxy, labels, order, usable, boxes, sorted_labels, lost, count,
                *boxes_xyxy.stride(), *labels.stride(), ROWS=ROWS,
            )  # fmt: skip
    return order, boxes, sorted_labels, lost


def select_detections_triton(
    boxes_xyxy: Tensor,
    scores: Tensor,
    score_threshold: float,
    threshold: float,
    max_detections: int,
    multi_label: bool,
    max_candidates: int,
) -> list[Detections]:
    """The contract of kernels.nms.select_detections for B, A and K above 0 and scores that are not float64.

    The host waits once, for the number of survivors of each image.
    """
    location, labels, is_candidate = _best_first(boxes_xyxy, scores, score_threshold, multi_label, max_candidates)
    boxes = boxes_xyxy.gather(1, location[:, :, None].expand(-1, -1, 4))  # (B, N, 4)
    kept, survivors = suppress(boxes, labels, is_candidate, threshold, max_detections)
    counts = survivors.tolist()
    # A few launches gather the survivors of the whole batch, then views split them: launches per image would cost more.
    image = torch.arange(len(counts), device=kept.device).repeat_interleave(survivors, output_size=sum(counts))  # (S,)
    rank = torch.arange(len(image), device=kept.device) - (survivors.cumsum(0) - survivors)[image]
    row = kept[image, rank].long()
    places, classes = location[image, row], labels[image, row]
    columns = (boxes_xyxy[image, places], scores[image, places, classes], classes)
    return [Detections(*parts) for parts in zip(*(column.split(counts) for column in columns))]


def _best_first(
    boxes_xyxy: Tensor, scores: Tensor, score_threshold: float, multi_label: bool, max_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, A, 4), (B, A, K) -> locations, labels and is_candidate, each (B, N), best first, ties by location and class.

    N = min(max_candidates, A K), or A in place of A K without multi_label. Scores are not float64.
    """
    usable = scores.masked_fill(~(boxes_xyxy.isfinite().all(2, keepdim=True) & scores.isfinite()), -torch.inf)
    best_label = usable.argmax(2)  # (B, A), ties: the first
    columns = usable.shape[2] if multi_label else 1
    usable = (usable if multi_label else usable.amax(2)).flatten(1)  # (B, A * columns)
    is_candidate = (usable > score_threshold) & (usable > -torch.inf)
    values = usable.float() + 0.0  # -0 becomes 0
    # The bits of floats are ordered like integers, those of negative ones in reverse. The low half of a key is the
    # place among ties. So all keys differ, and topk takes the best without sorting the rest.
    bits = values.view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    place = torch.arange(values.shape[1], device=values.device)
    keys = torch.where(is_candidate, (bits << 32) | (0xFFFFFFFF - place), NO_CANDIDATE)
    keys = keys.topk(min(max_candidates, keys.shape[1]), dim=1).values  # (B, N)
    pair = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    is_candidate = keys != NO_CANDIDATE
    pair = torch.where(is_candidate, pair, 0)
    location = pair // columns
    labels = pair % columns if multi_label else best_label.gather(1, location)
    return location, labels, is_candidate
