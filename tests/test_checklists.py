"""Checklists of reporting guidelines: every item once, each with a place in the book or a reason."""
import re

import pytest
import yaml

from thesis_ltc.book.checklists import (
    NOT_APPLICABLE,
    NOT_REPORTED,
    PARTLY,
    REPORTED,
    checklist_page,
    count_items,
    page_source,
    place_name,
    read_checklist,
)

REFORMS_ITEMS = (3, 5, 7, 3, 6, 3, 3, 2)   # of its modules 1 to 8
NUMBERS = {
    "claim": [str(number) for number in range(1, 45)],
    "reforms": [
        f"{module}{'abcdefg'[item]}" for module, items in enumerate(REFORMS_ITEMS, 1) for item in range(items)
    ],
}
PAGES = {"claim": "94_claim.ipynb", "reforms": "95_reforms.ipynb"}


@pytest.fixture(params=NUMBERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(root):
    "The folder of the pages, to which links are relative."
    return root / "nbs" / "report"


@pytest.fixture
def items(name, folder):
    return read_checklist(folder / "checklists" / f"{name}.yaml")


def listed_pages(root) -> set[str]:
    "The pages of the book, as its table of contents names them."
    text = (root / "_toc.yml").read_text(encoding="utf-8")
    return {yaml.safe_load(text)["root"], *re.findall(r"- file: (\S+)", text)}


def test_guidelines_have_as_many_items_as_their_articles_say():
    assert len(NUMBERS["claim"]) == 44 and len(NUMBERS["reforms"]) == 32


def test_every_item_stands_once_and_in_order(name, items):
    assert [item.number for item in items] == NUMBERS[name]


def test_every_item_has_a_place_or_a_reason(items):
    for item in items:
        assert item.item.endswith("."), item.number
        assert bool(item.links) == (item.status in (REPORTED, PARTLY)), item.number
        assert item.note or item.status == REPORTED, item.number
        if item.status in (NOT_REPORTED, NOT_APPLICABLE):
            assert len(item.note.split()) > 3, f"item {item.number} gives no reason: {item.note}"


def test_every_link_leads_to_a_page_and_a_section_of_the_book(items, folder, root):
    listed = listed_pages(root)
    for item in items:
        for link in item.links:
            assert place_name(link, folder)   # raises where page or section is missing
            page = page_source(link, folder).relative_to(root.resolve()).with_suffix("").as_posix()
            assert page in listed, f"item {item.number}: {page} is not in _toc.yml"


def test_no_link_of_an_item_occurs_twice(items):
    assert not [item.number for item in items if len(set(item.links)) < len(item.links)]


def test_notes_are_short_sentences(items):
    for item in items:
        for sentence in re.split(r"(?<=\.) ", item.note):
            assert len(sentence.split()) <= 25 and (not sentence or sentence.endswith(".")), item.number


def test_counts_add_up_and_none_is_hidden(name, items, folder):
    assert sum(count_items(items).values()) == len(NUMBERS[name])
    shown = checklist_page(items, folder).data
    assert re.findall(r"<tr><td>(\w+)</td>", shown) == NUMBERS[name]


def test_the_page_reads_the_list(name, folder):
    text = (folder / PAGES[name]).read_text(encoding="utf-8")
    assert f'\\"{name}.yaml\\"' in text and "count_sentence" in text
