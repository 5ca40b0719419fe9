"""The pieces of a web page in one file: it loads nothing, runs nothing and opens from a disk.

What is `Markup` goes into the page as it is; any other text is escaped, wherever it comes from.
"""

import base64
import html
from collections.abc import Collection, Sequence

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #5f6570; --paper: #ffffff;
  --line: #d9dce1; --shade: #f3f4f6; --accent: #2f6db3; --alarm: #b3452f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --quiet: #a0a6b1; --paper: #16181c;
  --line: #363a42; --shade: #202329; --accent: #74a9e6; --alarm: #ef8f78; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 54rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .5rem 0; }
a { color: var(--accent); }
code { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: .5rem 0; padding: .6rem .8rem; background: var(--shade); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.quiet, figcaption { color: var(--quiet); font-size: .92rem; }
.alarm { padding: .6rem .9rem; background: var(--shade); border-left: 4px solid var(--alarm); }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .25rem 1.1rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td:not(.number) { min-width: 4.5rem; }
td:first-child { white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
td.number, th.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.bar { width: 10rem; max-width: 30vw; height: .7rem; margin-top: .4rem; background: var(--shade); }
.bar div { height: 100%; background: var(--accent); }
figure { margin: 1.2rem 0 1.8rem; }
figure img { display: block; max-width: 100%; height: auto; margin: .5rem 0; }
img.pixels { image-rendering: pixelated; }
img.paper { background: #ffffff; border-radius: 4px; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr));
  gap: 0 1.5rem; }
.beside figure { margin: .6rem 0; }
.beside img { width: 100%; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 34rem) { body { padding-top: 1rem; font-size: 15px; }
  table { font-size: .84rem; } th, td { padding-right: .7rem; } .bar { max-width: 20vw; }
  td:first-child { white-space: normal; } }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .wide { overflow: visible; } }
"""
# Nothing may be fetched, not even what a mistake of ours would let into the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """HTML that is whole and safe to put into a page."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Text as HTML; `Markup` is that already."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def joined(parts: Sequence[str]) -> Markup:
    """One piece after the other."""
    return Markup("\n".join(map(escaped, parts)))


def paragraph(text: str, kind: str = "") -> Markup:
    """A paragraph; `kind` is "quiet" for what can be skipped and "alarm" for what cannot."""
    attribute = f' class="{kind}"' if kind else ""
    return Markup(f"<p{attribute}>{escaped(text)}</p>")


def strong(text: str) -> Markup:
    return Markup(f"<strong>{escaped(text)}</strong>")


def preformatted(text: str) -> Markup:
    """A command or other text of a fixed pitch."""
    return Markup(f"<pre><code>{escaped(text)}</code></pre>")


def link(target: str, text: str) -> Markup:
    """A link to a file beside the page."""
    return Markup(f'<a href="{html.escape(target)}">{escaped(text)}</a>')


def bar(share: float) -> Markup:
    """A bar, `share` (0 to 1) of its cell long."""
    return Markup(f'<div class="bar"><div style="width:{100 * share:.1f}%"></div></div>')


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()
) -> Markup:
    """A table; the columns `numbers` are set as figures. Wider than the page, it can be moved."""
    lines = [_row("th", header, numbers), *(_row("td", row, numbers) for row in rows)]
    return Markup(f'<div class="wide"><table>\n{joined(lines)}\n</table></div>')


def _row(kind: str, cells: Sequence[str], numbers: Collection[int]) -> Markup:
    tags = [f'{kind} class="number"' if i in numbers else kind for i in range(len(cells))]
    written = (f"<{tag}>{escaped(cell)}</{kind}>" for tag, cell in zip(tags, cells, strict=True))
    return Markup(f"<tr>{''.join(written)}</tr>")


def image(content: bytes, mime_type: str, title: str, kind: str = "") -> Markup:
    """A picture, inside the page; `kind` is "pixels" for grids of small images, "paper" for charts.

    "pixels" are not smoothed where they are enlarged; "paper" is white, in dark mode too.
    """
    encoded = base64.b64encode(content).decode()
    attribute = f' class="{kind}"' if kind else ""
    source = f"data:{mime_type};base64,{encoded}"
    return Markup(f'<img{attribute} alt="{html.escape(title)}" src="{source}">')


def figure(picture: Markup, title: str, caption: str) -> Markup:
    """A picture under its title and over what it shows."""
    heading = f"<h3>{escaped(title)}</h3>\n" if title else ""
    return Markup(
        f"<figure>{heading}{picture}\n<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def beside(figures: Sequence[Markup]) -> Markup:
    """Figures in as many columns as there is room for."""
    return Markup(f'<div class="beside">\n{joined(figures)}\n</div>')


def folded(summary: str, *parts: Markup) -> Markup:
    """Pieces that are shown when asked for."""
    return Markup(f"<details><summary>{escaped(summary)}</summary>\n{joined(parts)}\n</details>")


def section(title: str, *parts: Markup) -> Markup:
    """Pieces under a heading; nothing where there are none."""
    if not any(parts):
        return Markup()
    return Markup(f"<section><h2>{escaped(title)}</h2>\n{joined(parts)}\n</section>")


def page(title: str, subtitle: str, *sections: Markup) -> str:
    """The whole page."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escaped(title)}</h1>
{paragraph(subtitle, "quiet")}</header>
<main>
{joined([part for part in sections if part])}
</main>
</body>
</html>
"""
