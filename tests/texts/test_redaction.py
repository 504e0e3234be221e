"""What opens a file to whoever reads it is neither stored nor shown."""

import json

import pytest

from marsinfer_cli.events import print_event
from pipeline.errors import InputError
from pipeline.records import RowError
from pipeline.settings.run_settings import BatchConfig
from pipeline.settings.sources import to_toml
from pipeline.storage.remote import place_of
from pipeline.texts.redaction import bare, hidden, without_secrets

SECRET = "http://user:S3CRET@host/deep/d.jsonl?X-Signature=S3CRET/S3CRET#S3CRET"
SHOWN = "http://***@host/deep/d.jsonl?***"


@pytest.mark.parametrize(
    ("url", "shown", "without"),
    [
        (SECRET, SHOWN, "http://host/deep/d.jsonl"),
        ("https://u:p?w#x@h/a@b.jsonl", "https://***@h/a@b.jsonl", "https://h/a@b.jsonl"),
        ("https://h/a.jsonl#tok", "https://h/a.jsonl?***", "https://h/a.jsonl"),
        ("https://token@h", "https://***@h", "https://h"),
        ("simplecache::https://u:p@h/x?q", "simplecache::https://***@h/x?***", "simplecache::https://h/x"),
        ("zip://a.csv::https://u:p@h/x.zip?q", "zip://a.csv::https://***@h/x.zip?***", None),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("s3://bucket/a.parquet?versionId=3/4", "s3://bucket/a.parquet?***", "s3://bucket/a.parquet"),
        ("/data/a?b=c@d.jsonl", "/data/a?b=c@d.jsonl", "/data/a?b=c@d.jsonl"),
    ],
)
def test_user_info_and_query_are_hidden(url, shown, without):
    assert hidden(url) == hidden(hidden(url)) == shown
    assert without is None or bare(url) == without
    assert without_secrets(f"({url}); '{url}' is gone, see {url}.") == (
        f"({shown}); '{shown}' is gone, see {shown}."
    )


def test_a_text_without_urls_stays():
    text = "is that so? a=b, me@here: c://d"
    assert without_secrets(text) == text


def test_a_place_has_a_name_without_secrets():
    pytest.importorskip("aiohttp")
    place = place_of(SECRET)
    assert (str(place), place.name, place.suffix) == (SHOWN, "d.jsonl", ".jsonl")
    assert "S3CRET" in place.key


def test_nothing_that_is_stored_or_told_has_it(capfd):
    config = BatchConfig(input=(SECRET, "a.jsonl"), output="o.parquet", question="what?")
    print_event("start", config=config, output=[SECRET], message=f"of {SECRET}: x")
    printed = capfd.readouterr().err
    told = [str(InputError(f"{SECRET} is gone")), str(RowError("kind", SECRET)), to_toml(config), printed]
    told.append(json.dumps(config.resolved()))
    assert "S3CRET" not in "".join(told)
    assert all(SHOWN in text for text in told)
    assert config.input[0] == SECRET
