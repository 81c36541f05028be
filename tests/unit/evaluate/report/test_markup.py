from __future__ import annotations

from pillsnap.evaluate.report.markup import Markup, join, tag


def test_text_and_attributes_are_escaped():
    assert tag("p", "<b> & co", title='"x" <y>') == '<p title="&quot;x&quot; &lt;y&gt;">&lt;b&gt; &amp; co</p>'


def test_built_markup_is_not_escaped_again():
    assert tag("p", tag("b", "1 < 2"), Markup("&nbsp;")) == "<p><b>1 &lt; 2</b>&nbsp;</p>"


def test_content_of_all_kinds():
    assert join(["a", None, 3, 0.5, ("<", [Markup("<br>")])]) == "a30.5&lt;<br>"


def test_attribute_names_and_values():
    assert tag("line", x1=1.23456, class_="a", stroke_width=2, hidden=True, id=None, open=False) == (
        '<line x1="1.23" class="a" stroke-width="2" hidden></line>'
    )
    assert tag("br") == "<br>"


def test_what_html_cannot_hold_is_replaced():
    assert join("a\x00b\ud800c\n") == "a\ufffdb\ufffdc\n"
