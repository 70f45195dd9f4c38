"""What the figures share: the page around a drawing."""

from collections.abc import Iterable


def page(width: int, height: int, title: str, heading: str, drawing: Iterable[str], note: str) -> str:
    """The text of an SVG file: `heading` above the drawing, `note` below. title: for readers that show no picture."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="10" y="22" font-size="14" font-weight="bold">{heading}</text>',
            *drawing,
            f'<text x="10" y="{height - 8}" fill="#666">{note}</text>',
            "</svg>\n",
        ]
    )
