"""Make a trained detector narrower: remove the channels that matter least until it costs a share of its FLOPs.

    python -m engine.pruning CHECKPOINT --flops SHARE --by SCORE --out FILE.pt [--data CONFIG | FORMAT ROOT [SPLIT]]

Examples:

    python -m engine.pruning runs/own/weights/last.pt --flops 0.5 --by taylor --data runs/own/config.yaml --out half.pt
    python -m engine.pruning yolov8n.pt --arch yolov8n --flops 0.25 --by bn_gamma --out quarter.pt

Two files are written. FILE.pt is a checkpoint like any other: eval.py, predict.py, export.py and the app open it, and
`student: {arch: yolov8n, weights: FILE.pt}` trains it further, as every pruned model needs, alone or with the whole
model as its teacher. FILE.yaml holds its widths: `student: {arch: yolov8n, widths: FILE.yaml}` trains the same shape
from scratch, the row that a pruned one has to beat (arXiv:1810.05270).

Scores (distill/pruning/scores.py): taylor, the change of the detection loss on pictures of --data, which none of the
others reads; bn_gamma, l2 and random. Channels that belong together go together (layers/channel_groups.py). The widths
that remain are multiples of --multiple, and no group of channels loses more than 1 - --floor of them. With taylor those
go first that matter least for the FLOPs they save, with the others those that matter least in their group.

YOLOv8, YOLOv5, YOLOv7-tiny and Faster R-CNN on a ResNet can be pruned, also a second time.

Exit codes: 0 written, 2 a mistake in the arguments or the data, 5 a file that could not be written, 130 after Ctrl-C.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import fine_tuning
from checkpoint import CheckpointInfo
from config import check_image_size, load_config
from datasets.class_names import released_columns
from datasets.index import DatasetIndex
from datasets.loader import Loader
from datasets.open import READERS, open_dataset, require_objects
from distill.pruning import scores
from distill.pruning.cost import count_regions, flops_of_widths
from distill.pruning.cut import channels_to_keep
from distill.pruning.files import widths_text
from engine.runtime.run_folder import write_text
from engine.training.building import count_parameters
from engine.training.splits import take
from errors import ArgumentParser, UserError, expect, naming, run_script, shortened
from layers.channel_groups import ChannelGroups, find_groups
from structures import Targets

BATCH_SIZE = 4  # images of a gradient: small, see scores.taylor


def prune(args: argparse.Namespace) -> None:
    model, info = checkpoint.load_model(args.checkpoint, args.arch)
    image_size = args.image_size or info.image_size
    with naming(f"{args.checkpoint}: {info.arch} cannot be pruned", ValueError):
        groups = find_groups(model)
    state = model.state_dict()
    flops = flops_of_widths(state, groups, image_size=image_size, regions=count_regions(model))
    before = flops(groups.widths())
    values = channel_scores(args, model, info, groups, image_size)
    try:
        is_kept = channels_to_keep(
            groups,
            values,
            flops=flops,
            limit=args.flops * before,
            per_flops=args.by == "taylor",
            multiple=args.multiple,
            floor=args.floor,
        )
    except ValueError as error:
        raise UserError(f"--flops {args.flops:g}: {error}; give a lower --floor or --multiple") from None
    narrow = groups.select(state, is_kept)
    widths = {name: int(is_kept[own].sum()) for name, own in groups.groups.items()}
    pruned = checkpoint.build_for(info.arch, len(info.names), narrow)
    checkpoint.load_state(pruned, narrow, args.out)
    about = {"arch": info.arch, "names": list(info.names), "image_size": image_size, "config": info.config}
    checkpoint.save(args.out, about | {"epoch": info.epoch, "step": info.step, "ema": narrow})
    write_text(args.out.with_suffix(".yaml"), widths_text(info.arch, widths))
    kept = sum(widths.values())
    print(
        f"{info.arch} by {args.by}: {before / 1e9:.3f} -> {flops(widths) / 1e9:.3f} GFLOPs at {image_size} px "
        f"({100 * flops(widths) / before:.1f} %), {count_parameters(model):,} -> {count_parameters(pruned):,} "
        f"parameters, {groups.count:,} -> {kept:,} channels in {len(widths)} groups"
    )
    print(f"written: {args.out}, {args.out.with_suffix('.yaml')}")


def channel_scores(
    args: argparse.Namespace, model: nn.Module, info: CheckpointInfo, groups: ChannelGroups, image_size: int
) -> Tensor:
    """(C,): the scores of --by."""
    if args.by == "random":
        return scores.random(groups, torch.Generator().manual_seed(args.seed))
    if args.by != "taylor":
        return {"bn_gamma": scores.bn_gamma, "l2": scores.l2}[args.by](model.state_dict(), groups)
    index = take_pictures(args.data, args.pictures)
    torch.manual_seed(args.seed)
    if info.names != index.names:  # the loss is that of the dataset's classes, joined by name
        if not any(c is not None for c in released_columns(index.names, info.names, str(args.checkpoint))):
            found = f"{args.checkpoint}: none of its classes is among {shortened(index.names)}"
            raise UserError(f"{found}; expected pictures of objects that it detects")
        model = fine_tuning.start_model(info.arch, index.names, args.checkpoint)
    return scores.taylor(model, batches_of(index, image_size), groups)


def take_pictures(data: list[str], count: int) -> DatasetIndex:
    """At most `count` of the training pictures that --data names, the same ones each time.

    UserError where they have no object to learn.
    """
    classes: tuple[str, ...] = ()
    if data[0] in READERS and len(data) in (2, 3):
        place = data[0], data[1], data[2] if len(data) == 3 else "train"
    elif len(data) == 1:
        settings = load_config(data[0]).data
        place, classes = settings.train_place, settings.classes
    else:
        raise UserError(f"--data: found {' '.join(data)!r}, expected a config, or {'|'.join(READERS)} ROOT [SPLIT]")
    index = take(open_dataset(*place, classes=classes), count)
    require_objects(index, f"--data: {' '.join(place)}", place[1], with_difficult=False)
    return index


def batches_of(index: DatasetIndex, image_size: int) -> Iterator[tuple[Tensor, Targets]]:
    """Images in [0, 1], letterboxed and otherwise unchanged, with their objects."""
    loader = Loader(index, image_size=image_size, batch_size=BATCH_SIZE, seed=0, shuffle=False, cache=False)
    for batch in loader.epoch(0):
        yield batch.images.float() / 255, batch.targets


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser("python -m engine.pruning", __doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of ours, or a released one with --arch")
    parser.add_argument("--flops", type=float, required=True, metavar="SHARE", help="of its FLOPs that stay, in 0..1")
    parser.add_argument("--by", choices=("taylor", "bn_gamma", "l2", "random"), required=True, help="the score")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.pt", help="the pruned checkpoint")
    parser.add_argument(
        "--data", nargs="+", metavar="WORD", help="for taylor: a training config, or FORMAT ROOT [SPLIT] (split: train)"
    )
    parser.add_argument("--pictures", type=int, default=128, help="of --data, at most (%(default)s)")
    parser.add_argument("--arch", help="architecture of a released checkpoint, such as yolov8n")
    parser.add_argument("--image-size", type=int, help="side in pixels, a multiple of 32 (as trained)")
    parser.add_argument("--multiple", type=int, default=8, help="of which widths are multiples (%(default)s)")
    parser.add_argument("--floor", type=float, default=0.25, help="share of each group that stays (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of random scores (%(default)s)")
    args = parser.parse_args(argv)
    expect(0 < args.flops < 1, "--flops", f"{args.flops:g}", "a share between 0 and 1")
    expect(0 <= args.floor <= 1, "--floor", f"{args.floor:g}", "a share in 0..1")
    expect(args.multiple >= 1, "--multiple", args.multiple, "at least 1")
    expect(args.pictures >= 1, "--pictures", args.pictures, "at least 1")
    if args.image_size is not None:
        check_image_size("--image-size", args.image_size)
    if (args.by == "taylor") != (args.data is not None):
        found = "nothing, expected pictures for" if args.data is None else "pictures, which only taylor reads, with"
        raise UserError(f"--data: found {found} --by {args.by}")
    expect(args.out.suffix == ".pt", "--out", args.out, "a name that ends in .pt")
    for path in (args.out, args.out.with_suffix(".yaml")):
        expect(not path.exists(), "--out", f"{path}, which is there already", "a new name")
    return args


def main(argv: list[str]) -> None:
    prune(parse_arguments(argv))


if __name__ == "__main__":
    run_script(main)
