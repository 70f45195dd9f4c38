"""Seeded small sets of ground truth and detections that go looking for trouble: ties, limits, crowds, empty images.

A set is a dict of a COCO dataset and a list of COCO results, with sparse ids.
"""

import numpy as np

SIZES = [(32, 32), (64, 16), (96, 96), (128, 72), (31, 33), (95, 97), (8, 8), (10, 20), (200, 150), (300, 40)]


def random_coco_set(seed):
    """dataset, results: boxes on a grid (so that IoU meets thresholds exactly) or with decimals, many equal scores."""
    rng = np.random.default_rng(seed)
    num_images, num_classes = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    image_ids = rng.choice(10**6, num_images, replace=False) + (2**33 if seed % 7 == 0 else 0)
    category_ids = rng.choice(200, num_classes, replace=False)
    decimals = seed % 2 == 0
    annotations, results = [], []
    for image_id in image_ids.tolist():
        objects = []
        for _ in range(int(rng.choice([0, 0, 1, 2, 4, 9]))):
            width, height = SIZES[rng.integers(len(SIZES))]
            x, y = rng.integers(0, 20, 2) * 8
            box = [float(x), float(y), float(width), float(height)]
            if decimals:
                box = np.round(np.array(box) + rng.random(4) * 3, 2).tolist()
            area = rng.choice([box[2] * box[3], box[2] * box[3] * 0.6, 1024.0, 9216.0, 1e10, 0.0])
            objects.append((box, int(rng.choice(category_ids))))
            annotations.append(
                {
                    "id": int(len(annotations) + 1),
                    "image_id": image_id,
                    "category_id": objects[-1][1],
                    "bbox": box,
                    "area": float(area),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
        many = seed % 23 == 0  # beyond 100 of one class in an image
        for _ in range(130 if many else int(rng.choice([0, 1, 5, 15]))):
            category = int(rng.choice(category_ids[:1] if many else category_ids))
            if objects and rng.random() < 0.8:
                box, own = objects[rng.integers(len(objects))]
                box = np.array(box)
                shift = rng.integers(-2, 3, 4) * rng.choice([0, 0, 2, 4, 8])
                if decimals:
                    shift = np.round(shift * rng.random(4), 2)
                box = np.maximum(box + shift, [0, 0, 0, 0]).tolist()
                category = own if rng.random() < 0.8 and not many else category
            else:
                width, height = SIZES[rng.integers(len(SIZES))]
                box = [float(rng.integers(0, 200)), float(rng.integers(0, 200)), float(width), float(height)]
            score = rng.choice([0.1, 0.5, 0.5, 0.9]) if rng.random() < 0.6 else rng.random()
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": float(score)})
    order = rng.permutation(len(results))
    dataset = {
        "info": {},
        "images": [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in image_ids.tolist()],
        "categories": [{"id": int(c), "name": f"class{c}"} for c in category_ids],
        "annotations": annotations,
    }
    return dataset, [results[i] for i in order]


def as_tables(dataset, results):
    """GroundTruth and DetectionTable of a set: images and classes by rising id."""
    from metrics.tables import DetectionTable, GroundTruth

    images = sorted(image["id"] for image in dataset["images"])
    categories = sorted(dataset["categories"], key=lambda c: c["id"])
    label = {c["id"]: k for k, c in enumerate(categories)}

    def columns(rows):
        xywh = np.array([r["bbox"] for r in rows], dtype=float).reshape(-1, 4)
        corners = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
        image = np.array([images.index(r["image_id"]) for r in rows], dtype=int)
        labels = np.array([label[r["category_id"]] for r in rows], dtype=int)
        return image, corners, labels, xywh[:, 2] * xywh[:, 3]

    image, boxes, labels, box_area = columns(dataset["annotations"])
    ground_truth = GroundTruth(
        image,
        boxes,
        labels,
        len(images),
        tuple(c["name"] for c in categories),
        crowd=np.array([a["iscrowd"] for a in dataset["annotations"]], dtype=bool),
        area=np.array([a["area"] for a in dataset["annotations"]], dtype=float),
        box_area=box_area,
    )
    image, boxes, labels, box_area = columns(results)
    return ground_truth, DetectionTable(image, boxes, np.array([r["score"] for r in results]), labels, box_area)


def as_rows(ground_truth, detections):
    """The rows of the tables as tests.reference.detection_metrics takes them."""
    truths = [
        {"image": int(i), "label": int(k), "box": tuple(map(float, b)), "crowd": bool(c), "difficult": bool(d)}
        for i, k, b, c, d in zip(
            ground_truth.image,
            ground_truth.labels,
            ground_truth.boxes_xyxy,
            ground_truth.crowd,
            ground_truth.difficult,
        )
    ]
    found = [
        {"image": int(i), "label": int(k), "box": tuple(map(float, b)), "score": float(s)}
        for i, k, b, s in zip(detections.image, detections.labels, detections.boxes_xyxy, detections.scores)
    ]
    return truths, found
