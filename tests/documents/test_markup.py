"""HTML: the text and structure of a page, its encoding, and what is refused by name."""

from __future__ import annotations

import pytest

from longpo_ops.documents import Listing, find_files, read_documents
from longpo_ops.documents.markup import DEEP, UNKNOWN, as_markdown, decode_page

CASES = {
    "headings": ("<h1>One</h1><h2>Two <code>x</code></h2><p>text", "# One\n\n## Two `x`\n\ntext"),
    "blocks part words": ("<header>H</header><main>M</main><form>q<button>go</button>", "H\n\nM\n\nq go"),
    "tags left open": ("<p>one<p>two<ul><li>three<li>four</ul>", "one\n\ntwo\n\n* three\n* four"),
    "lists": ("<ol start=3><li>a<ul><li>b</li></ul></li><li>c</li></ol>", "3. a\n   * b\n4. c"),
    "table": (
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td><p>x</p><p>y</p></td></tr></table>",
        "| a | b |\n| --- | --- |\n| 1 | x y |",
    ),
    "code": (
        "<pre><b>def</b> f(x):\n\n\n    return x_y*2 &lt; 3\n</pre>",
        "```\ndef f(x):\n\n\n    return x_y*2 < 3\n```",
    ),
    "marks of Markdown": ("<p>a_b*c and [x] # y</p>", "a_b*c and [x] # y"),
    "links and pictures": ("<p>a <a href=x>word</a> <img src='data:x' alt=no> http://b.c</p>", "a word http://b.c"),
    "what is hidden until it is opened": (
        "<details><summary>s</summary>in</details><p hidden>h</p>",
        "**s**\n\nin\n\nh",
    ),
    "what is no text": (
        "<head><title>t</title><style>x</style></head><nav>menu</nav><p>a<script>var b = '</p><p>';</script><svg><text>s",
        "a",
    ),
    "spaces and broken lines": ("<p>a&nbsp;b<br>c\nd</p>\r\n<p>e", "a b\nc\nd\n\ne"),
    "a page of no tags": ("a < b && c", "a < b && c"),
    "characters": ("&copy;&#x4e2d;<sup>2</sup> &notanentity <q>x</q>", '©中2 ¬anentity "x"'),
    "XHTML": (
        '<?xml version="1.0" encoding="UTF-8"?><!DOCTYPE html><html><head><title/><script src="a"/></head>'
        '<body><h2 id="a"/><p>a</p><b/><textarea/><br/><p title="x">c</p></body></html>',
        "a\n\nc",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_page_keeps_its_words_and_its_structure(case):
    page, text = CASES[case]
    assert as_markdown(page) == text


def test_tags_nested_too_deep_are_refused_and_not_read_in_part():
    assert as_markdown("<div>" * 500 + "word" + "</div>" * 500) == "word"
    assert as_markdown("<p>first</p>" + "<div>" * 5000 + "word" + "</div>" * 5000) is DEEP


@pytest.mark.parametrize(
    ("page", "encoding"),
    [
        ("<p>中文 Dünen", "utf-8"),
        ("<p>中文 Dünen", "utf-16"),
        ("<meta charset=utf-8><p>中文", "utf-8-sig"),
        ('<META http-equiv="Content-Type" content="text/html; charset=gb2312"><p>中文鎔', "gb18030"),
        ('<meta charset="Shift_JIS"><p>風車①', "cp932"),
        ("<meta charset='iso-8859-1'><p>“Dünen” €", "cp1252"),
        ('<?xml version="1.0" encoding="koi8-r"?><p>ветер', "koi8-r"),
        ("<meta charset=unknown><p>中文", "utf-8"),
        ("<meta charset=ascii-not><p>中文", "utf-8"),
        ("<meta charset=gb2312><p>中文文字", "utf-8"),  # what it declares is not so, and would have letters, too
        ("<meta charset=iso-2022-jp><p>風車", "iso-2022-jp"),  # bytes of ASCII
    ],
)
def test_a_page_is_utf8_or_what_it_declares(page, encoding):
    assert decode_page(page.encode(encoding)) == page


def test_a_page_of_an_unknown_encoding_is_refused_by_name(tmp_path):
    assert decode_page("<p>Dünen".encode("latin-1")) is UNKNOWN
    (tmp_path / "a.html").write_bytes("<meta charset=utf-8><p>中文".encode("gb18030"))
    (tmp_path / "b.html").write_text("<div>" * 5000 + "word")
    (tmp_path / "c.html").write_bytes("<meta charset=euc-jp><p>風車".encode("euc-jp"))
    listing = Listing()
    (document,) = read_documents(find_files([tmp_path]), listing)
    assert (document.text, listing.skipped) == ("風車", {UNKNOWN: 1, DEEP: 1})
