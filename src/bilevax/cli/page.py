"""report.html: one file with its figures inside."""

import base64
import html
import io
import logging
import warnings
from string import Template

from matplotlib.figure import Figure

from bilevax.cli.figures import MAX_NAMES, plot_coefficients, plot_losses, plot_penalties
from bilevax.cli.report import Study, conclude, tabulate

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font-family: sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; }
pre { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid #ddd; }
</style>
</head>
<body>
<h1>$title</h1>
<pre>$table</pre>
<p>$conclusion</p>
$sections
</body>
</html>
""")


_INEXACT = """
<p>The losses of the steps are those of fits that end early, with the pull of --shrink. They may be
above or below the accurate ones, so the curve need not start on the line. The losses in the table
are accurate, and without the pull.</p>"""


def write_page(study: Study) -> str:
    """Return the text of report.html."""
    # What Matplotlib has to say of letters that its font lacks, or of a first start that takes
    # long, is nothing for a terminal.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _write_page(study)


def _write_page(study: Study) -> str:
    many = len(study.penalties.names) > MAX_NAMES
    half = f"the {MAX_NAMES // 2} weakest and strongest of {len(study.penalties.names)}"
    figures = [
        ("Loss, step by step", plot_losses(study), _INEXACT),
        (f"Penalties, {half}" if many else "Penalties", plot_penalties(study), ""),
        ("Coefficients", plot_coefficients(study), ""),
    ]
    sections = [
        f"<h2>{title}</h2>\n{_embed(figure, title)}{caption}" for title, figure, caption in figures
    ]
    settings = {"settings": study.settings, "seconds": study.seconds}
    sections += [_table(title.capitalize(), entries) for title, entries in settings.items()]
    return _PAGE.substitute(
        title=html.escape(f"{study.name}: tuned penalties"),
        table=html.escape(tabulate(study)),
        conclusion=html.escape(conclude(study)),
        sections="\n".join(sections),
    )


def _embed(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{title}" src="data:image/png;base64,{data}">'


def _table(title: str, entries: dict) -> str:
    def cell(value: object) -> str:
        return f"{value:.2f}" if title == "Seconds" else html.escape(str(value))

    lines = [
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{cell(value)}</td></tr>"
        for name, value in entries.items()
    ]
    return f"<h2>{title}</h2>\n<table>\n" + "\n".join(lines) + "\n</table>"
