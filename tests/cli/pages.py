"""What is in a report's page: its words, its pictures, and what it would load."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Strict(HTMLParser):
    """Fails on tags that do not close in order; gathers scripts, addresses and the visible words."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.words, self.scripts, self.addresses, self.handlers = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] not in (["style"], []):
            self.words.append(data)


def parsed(page):
    parser = Strict()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def words(page):
    return " ".join(" ".join(parsed(page).words).split())


def pictures(page):
    found = re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL)
    return [ET.fromstring(html_entities_only_of_xml(svg)) for svg in found]


def html_entities_only_of_xml(svg):
    assert set(re.findall(r"&(\w+);", svg)) <= {"amp", "lt", "gt", "quot"}
    return svg
