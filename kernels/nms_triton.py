"""Non-maximum suppression on a GPU: the greedy set of kernels.nms, of a batch of images, without a word to the host.

As the specification, the order is walked in blocks; a block is BLOCK candidates of every image at once:

    _usable_kernel    which rows are candidates; then the device sorts their scores
    _gather_kernel    boxes and labels in that order (both for one image only)
    _compare_kernel   who overlaps whom in the block: for each candidate, a bit for each better one that suppresses it
    _settle_kernel    who survives in the block: one program an image walks its bits, 64 candidates at a time
    _spread_kernel    who is lost further down: every later candidate against the block's survivors only

Nothing is as large as the square of the number of boxes, what is suppressed is never compared again, and an image that
has `max_detections` survivors costs the rest of the walk nothing. The arithmetic is that of the specification to the
last bit: float32 in the same order, a division that rounds correctly, no fused multiply-add. So is the kept set.
"""

import torch
from torch import Tensor

from kernels.backend import HAS_TRITON
from layers.precision import compute_dtype
from structures import Detections

BLOCK = 2048  # candidates: enough work to hide three launches, few enough for one program to settle
WORD = 64  # bits
ROWS = 256  # of a program that prepares
NO_CANDIDATE = torch.iinfo(torch.int64).min  # its key

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
        # (I, J): would i suppress j, if kept? The kernels are compiled without fused multiply-add.
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
        # The scores; -inf where a number of the row is not finite. -0 becomes 0, which a sort by bits tells apart.
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
        # Boxes corner by corner and labels, best first; lost: those that are no candidates from the start.
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
        # Bits nobody will look at are not written: of later words, of lost candidates, of images that have enough.
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
        # keep(j) = not lost(j) and no kept i before j suppresses it, 64 candidates at a time. Among those 64 the rule
        # is iterated until nothing changes, as kernels.nms._settle does: at most as often as a chain is long.
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
                rivals = tl.sum(tl.where((words == word)[:, None], bits, 0), 0)  # (64,): bits among the 64
                keep = tl.sum(tl.where(is_free, one, 0), 0)
                previous = ~keep
                while keep != previous:
                    previous = keep
                    keep = tl.sum(tl.where(is_free & ((rivals & keep) == 0), one, 0), 0)
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
    """The walk over B images of N candidates each, best first: places (B, M) int32 and how many of them count (B,).

    boxes_xyxy (B, N, 4), labels (B, N), is_candidate (B, N), threshold a float32 number; M = min(max_detections, N).
    Row b of the places holds the survivors of image b, best first; after the number that count it holds anything.
    """
    boxes = boxes_xyxy.float().transpose(1, 2).contiguous()  # (B, 4, N)
    return _walk(boxes, labels.int().contiguous(), (~is_candidate).int(), threshold, max_detections)


def _walk(boxes: Tensor, labels: Tensor, lost: Tensor, threshold: float, max_detections: int) -> tuple[Tensor, Tensor]:
    """suppress, of boxes (B, 4, N) float32, labels (B, N) int32 and lost (B, N) int32: not 0 where no candidate is."""
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
    with torch.cuda.device_of(boxes):
        for block in range(triton.cdiv(count, block_size)):
            tiles = (images, block_size // WORD, block_size // 32)
            _compare_kernel[tiles](
                boxes, labels, lost, survivors, bits, block, count, limit, threshold, COLUMNS=32, **exact
            )
            _settle_kernel[(images,)](lost, bits, survivors, before, kept, block, count, limit, **exact)
            left = count - (block + 1) * block_size
            if left > 0:
                tiles = (triton.cdiv(left, 32), images)  # only the first may exceed 65,535
                _spread_kernel[tiles](
                    boxes, labels, lost, survivors, before, kept, block, count, limit, threshold, COLUMNS=32, **exact
                )
    return kept, survivors


def batched_nms_triton(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int
) -> Tensor:
    """The contract of kernels.nms.batched_nms; the host hears once, how many survive.

    Two kernels beside the sort, where PyTorch's own operations would be thirty: of a thousand boxes, launching them
    would be most of the time.
    """
    order, *candidates = in_order(boxes_xyxy, scores, labels)
    kept, survivors = _walk(*(x[None] for x in candidates), threshold, max_detections)
    return order[kept[0, : survivors.item()]]


def in_order(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, 4), (N,), (N,) -> rows (N,) by falling score, and in this order boxes (4, N), labels (N,), lost (N,)."""
    count, device = len(scores), scores.device
    usable = torch.empty(count, dtype=compute_dtype(scores), device=device)
    boxes = torch.empty(4, count, dtype=torch.float32, device=device)
    of_class, lost = torch.empty(2, count, dtype=torch.int32, device=device)
    grid = (triton.cdiv(count, ROWS),)
    with torch.cuda.device_of(boxes):
        if count:
            _usable_kernel[grid](boxes_xyxy, scores, usable, count, *boxes_xyxy.stride(), *scores.stride(), ROWS=ROWS)
        usable, order = usable.sort(stable=True, descending=True)
        if count:
            _gather_kernel[grid](
                boxes_xyxy, labels, order, usable, boxes, of_class, lost, count,
                *boxes_xyxy.stride(), *labels.stride(), ROWS=ROWS,
            )  # fmt: skip
    return order, boxes, of_class, lost


def select_detections_triton(
    boxes_xyxy: Tensor,
    scores: Tensor,
    score_threshold: float,
    threshold: float,
    max_detections: int,
    multi_label: bool,
    max_candidates: int,
) -> list[Detections]:
    """The contract of kernels.nms.select_detections, where B, A and K are above 0 and scores not float64.

    The host hears once, how many survive in each image.
    """
    location, labels, is_candidate = _best_first(boxes_xyxy, scores, score_threshold, multi_label, max_candidates)
    boxes = boxes_xyxy.gather(1, location[:, :, None].expand(-1, -1, 4))  # (B, N, 4)
    kept, survivors = suppress(boxes, labels, is_candidate, threshold, max_detections)
    counts = survivors.tolist()
    # All survivors of the batch in a few launches, then views of them: a launch for each image would cost more.
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
    best_label = usable.argmax(2)  # (B, A), the first of equal ones
    columns = usable.shape[2] if multi_label else 1
    usable = (usable if multi_label else usable.amax(2)).flatten(1)  # (B, A * columns)
    is_candidate = (usable > score_threshold) & (usable > -torch.inf)
    values = usable.float() + 0.0  # -0 becomes 0
    # A float's bits order as integers do, those of a negative one backwards. Below them, the place in the order of
    # ties: so no two keys are equal, and the best can be taken without sorting the rest.
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
