"""What a page offers: links to the public repository once its address is set in _config.yml, no script without a use, the same
from a folder as from a server, and no table that only a mouse can scroll."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image


def _buttons(app: Any, config: Any) -> None:
    options = config.html_theme_options
    if options.get("repository_url"):
        options["use_repository_button"] = options["use_issues_button"] = True
    else:
        options["launch_buttons"] = {}  # the theme cannot build a link from an empty address


def _stored(app: Any, config: Any) -> None:
    if os.environ.get("TINYHALL_BOOK") == "stored":  # `make preview`
        config.nb_execution_mode = "off"


def _no_thebe(app: Any, config: Any) -> None:
    # Jupyter Book always loads it. It is off here, yet would put its script on every page, and twice, which is an error there.
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def _onwards(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """At the foot of a page the next chapter, and not the tables that prove the one just read."""
    for place, side in (("prev", 1), ("next", 2)):
        target = pagename
        while target in app.builder.relations:
            target = app.builder.relations[target][side]
            if target is None or "/evidence/" not in target:
                break
        if target in app.env.titles and "/evidence/" not in target and pagename in app.builder.relations:
            title = app.builder.render_partial(app.env.titles[target])["title"]
            context[place] = {"link": app.builder.get_relative_uri(pagename, target), "title": title}


def _reading(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """How long a chapter takes to read; and pictures that load when they are scrolled to, in a place that is kept for them."""
    if doctree is None or "body" not in context:
        return
    body = context["body"]
    if re.fullmatch(r"book/\d\d_.*", pagename):
        words = sum(len(paragraph.astext().split()) for paragraph in doctree.findall(nodes.paragraph))
        minutes = max(round(words / 200), 1)
        body = body.replace("</h1>", f'</h1>\n<p class="th-time">{minutes} minutes to read, without the code</p>', 1)
    for source, name in app.builder.images.items():
        place = f'src="{"../" * pagename.count("/")}_images/{name}"'
        if place in body and not source.endswith(".svg"):
            with Image.open(Path(app.srcdir) / source) as picture:
                width, height = picture.size
            body = body.replace(place, f'{place} loading="lazy" width="{width}" height="{height}"')
    context["body"] = _linked(body) if pagename.startswith("book/") else body


def _linked(body: str) -> str:
    """Figures and verdicts get an address of their own, and a link to it, as headings and equations have."""
    figures, claims = itertools.count(1), itertools.count(1)

    def link(name: str, what: str) -> str:
        return f'<a class="headerlink" href="#{name}" title="Link to this {what}">#</a>'

    def figure(found: re.Match[str]) -> str:
        name = f"figure-{next(figures)}"
        return f'<img id="{name}" {found[1]}>' + link(name, "figure")

    def claim(found: re.Match[str]) -> str:
        if not re.search(r"<strong>(<[^>]*>)*(holds|does not hold|not decided)", found[1], re.IGNORECASE):
            return found[0]
        name = f"claim-{next(claims)}"
        return f'<p id="{name}">{found[1]}{link(name, "claim")}</p>'

    body = re.sub(r'<img ((?![^>]* id=)[^>]*src="(?:\.\./)+_images/[^>]*)>', figure, body)
    return re.sub(r"<p>((?:(?!</?p[ >]).)*)</p>", claim, body, flags=re.DOTALL)


def _mend(app: Any, exception: Exception | None) -> None:
    """What the theme writes into every page and no template can change."""
    for page in Path(app.outdir).rglob("*.html") if exception is None else ():
        text = page.read_text("utf-8")
        # From file:// a preloaded font is refused as another origin's, with an error; the style sheet loads it in either case.
        text = re.sub(r'<link rel="preload" as="font"[^>]*>\n?', "", text)
        # On a phone a table scrolls within this frame, which the keyboard could not reach.
        text = text.replace(
            '<div class="pst-scrollable-table-container">', '<div class="pst-scrollable-table-container" tabindex="0">'
        )
        page.write_text(text, "utf-8")


def setup(app: Any) -> dict[str, Any]:
    app.connect("config-inited", _buttons)
    app.connect("config-inited", _stored)
    app.connect("config-inited", _no_thebe)
    app.connect("html-page-context", _reading)
    app.connect("html-page-context", _onwards)
    app.connect("build-finished", _mend)
    return {"version": "1", "parallel_read_safe": True}
