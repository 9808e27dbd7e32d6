"""A Markdown page as HTML that needs no other file, for screens, phones and paper."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path
from urllib.parse import unquote

_STYLE = """\
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 66em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; line-height: 1.25; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #e4e7eb; }
nav ul { padding: 0; margin: 0; list-style: none; } nav ul ul { display: flex; flex-wrap: wrap; gap: .2em 1.2em; }
nav > .toc > ul > li > a { display: none; }
a { color: #0b5cad; text-decoration: none; } a:hover { text-decoration: underline; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { border: 1px solid #dde2e7; padding: .3em .6em; text-align: left; vertical-align: top; }
th { background: #f5f7f9; } tbody tr:nth-child(even) { background: #fafbfc; }
td:first-child, th:first-child { white-space: nowrap; position: sticky; left: 0; background: #f5f7f9; }
td strong { background: #fff3c4; padding: 0 .15em; border-radius: 2px; }
code { font-size: .92em; background: #f5f7f9; overflow-wrap: anywhere; } img { max-width: 100%; height: auto; }
@media screen and (max-width: 50em) {
  body { margin: 1em auto; } .picture img { max-width: none; width: 46em; } table { font-size: 12px; }
  td:first-child, th:first-child { white-space: normal; }
}
@media print {
  body { font-size: 11px; max-width: none; margin: 0; } nav { display: none; } table { font-size: 9px; }
  .wide { overflow: visible; } img, tr { break-inside: avoid; } h2 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def to_html(text: str, page: Path) -> str:
    """A Markdown page as HTML that needs no other file: pictures and style are in it.

    page: the Markdown file, which the links to pictures are relative to.
    """
    from markdown import Markdown

    convert = Markdown(extensions=["tables", "toc"], extension_configs={"toc": {"toc_depth": "2"}})

    def embed(match: re.Match[str]) -> str:
        data = (page.parent / unquote(match[1])).read_bytes()
        return f'src="data:image/svg+xml;base64,{base64.b64encode(data).decode()}"'

    body = re.sub(r'src="([^"]+\.svg)"', embed, convert.convert(text))
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<p>(<img [^>]*>)</p>", r'<div class="wide picture">\1</div>', body)
    title = f"<title>{escape(text.splitlines()[0].lstrip('# '))}</title>"
    meta = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">'
    head = f'<!DOCTYPE html>\n<html lang="en">\n{meta}\n{title}'
    contents = f"<nav>{convert.toc}</nav>\n"
    first, _, rest = body.partition("</h1>")
    return f"{head}\n<style>\n{_STYLE}</style>\n{first}</h1>\n{contents}{rest}\n</html>\n"
