"""Pictures and label files of sets with one or few objects."""

import json

from PIL import Image

ROW = "0 0.5 0.5 0.2 0.4\n"  # 40..60 x 24..56 of 100 x 80
BOX = [[40, 24, 60, 56]]


def picture(path, size=(100, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def xml(name="cell", size=(100, 80), filename="x.png", box=(41, 25, 60, 56), start=""):
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    sizes = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    item = f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>" if name else ""
    return f"{start}<annotation><filename>{filename}</filename>{sizes}{item}</annotation>"


def coco(names=("cell",), objects=((1, 1),), images=None, **changes):
    """objects: (image id, category id)."""
    images = [{"id": 1, "file_name": "x.png", "width": 100, "height": 80}] if images is None else images
    rows = [
        {"id": n, "image_id": image, "category_id": category, "bbox": [40, 24, 20, 32]}
        for n, (image, category) in enumerate(objects)
    ]
    categories = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
    return json.dumps({"images": images, "annotations": rows, "categories": categories} | changes)


def boxes(index):
    return [sample.boxes_xyxy.round(6).tolist() for sample in index.samples]
