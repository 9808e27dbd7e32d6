"""One page of a run's results, or of several runs side by side, as HTML and as Markdown.

    python -m eval.report runs/demo/extend-2k                                          # its results/report.html, .md
    python -m eval.report runs/a/dense runs/a/hybrid --output runs/report.html
    python -m eval.report runs/a/dense runs/a/hybrid --front docs/front.png            # the picture of a README

Reads what the other programs left in a run folder: recipe, training log, summary, results of evaluations. The HTML
needs no other file; the Markdown has its pictures in a folder beside it. Results of weights that the run no longer has
are left out, and named.
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.checkpoint import results_folder
from eval.report.front import draw_front
from eval.report.page import write
from eval.report.run import read_runs
from s2 import ending
from s2.arguments import new_parser, path


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser("eval.report", __doc__)
    parser.add_argument("runs", nargs="+", type=path, help="run folders: runs/demo/pretrain runs/demo/extend-2k")
    parser.add_argument(
        "--output", type=path, help=".html to write, .md beside it (for one run: its results/report.html)"
    )
    parser.add_argument("--front", type=path, help="only two needle heatmaps with a table below, as this .png")
    parser.add_argument("--names", nargs="+", help="what to call the runs, one each (default: the ends of their paths)")
    args = parser.parse_args(argv)
    if args.front is not None:
        written = draw_front(read_runs(args.runs, args.names), args.front)
    else:
        if len(args.runs) > 1 and args.output is None:
            raise ValueError("several runs need --output FILE, e.g. --output runs/report.html")
        page = args.output or results_folder(args.runs[0]) / "report.html"
        if page.suffix not in (".html", ".md"):
            raise ValueError(f"--output {page}: a page ends in .html or .md; both are written")
        written = write(read_runs(args.runs, args.names), page)
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    ending.run(main)
