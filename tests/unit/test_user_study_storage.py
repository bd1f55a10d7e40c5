"""The user study's storage, on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import IntegrityError
from user_study_fixture import ARMS, postgres, write_bundle

from invdpo.errors import InvdpoError
from user_study_app import offline, storage
from user_study_app.stimuli import Stimuli
from user_study_app.storage import Choice, Refused, Storage, database_url

SECRET_TEXT = "the left one looks like my neighbour"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def stimuli(bundle: Path) -> Stimuli:
    return Stimuli(bundle)


@pytest.fixture(scope="module")
def new_postgres() -> Iterator[Callable[[], str]]:
    with postgres() as new:
        yield new


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'votes.db'}"
    return request.getfixturevalue("new_postgres")()


@pytest.fixture
def db(url: str, stimuli: Stimuli) -> Iterator[Storage]:
    opened = Storage(url)
    opened.bind(stimuli)
    yield opened
    opened.close()


def come(db: Storage, stimuli: Stimuli) -> str:
    """The cookie of a new rater who has consented."""
    cookie = db.enter(db.invite(1, "test")[0], None, None)
    db.consent(cookie, "1", stimuli)
    return cookie


def answer(db: Storage, cookie: str, choices: list[Choice]) -> list[str]:
    """Vote on the next trials; their tokens."""
    tokens = []
    for choice in choices:
        _, shown = db.current(cookie)
        assert shown is not None
        tokens.append(shown.token)
        db.vote(cookie, shown.token, choice, 1500, None)
    return tokens


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(Refused) as caught:
        action()
    return caught.value.code


def everything(db: Storage) -> str:
    """All that the database holds, as text."""
    with db.engine.connect() as connection:
        return repr([[tuple(row) for row in connection.execute(select(t))] for t in storage.metadata.sorted_tables])


def migrate(db: Storage, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(storage.__file__).parent / "migrations"))
    with db._writer.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_migrations_make_exactly_the_tables_of_the_code(db: Storage) -> None:
    with db.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), storage.metadata) == []
    migrate(db, "base")
    assert inspect(db.engine).get_table_names() == ["alembic_version"]
    again = Storage(db.url.render_as_string(hide_password=False))
    with again.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), storage.metadata) == []
    again.close()


def test_a_database_of_a_newer_version_is_refused(db: Storage) -> None:
    with db._writer.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InvdpoError, match="newer version"):
        Storage(db.url.render_as_string(hide_password=False))


def test_sqlite_writes_ahead_and_to_the_disk(tmp_path: Path) -> None:
    db = Storage(f"sqlite:///{tmp_path / 'deep' / 'votes.db'}")
    with db.engine.connect() as connection:
        values = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in (
            "journal_mode", "synchronous", "foreign_keys", "secure_delete",
        )}  # fmt: skip
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}
    assert (tmp_path / "deep" / "votes.db").stat().st_mode & 0o077 == 0


def test_the_database_itself_keeps_one_vote_a_trial(db: Storage, stimuli: Stimuli) -> None:
    answer(db, come(db, stimuli), ["left"])
    row = {key: value for key, value in db.votes()[0].items() if key in storage.vote.c}
    with pytest.raises(IntegrityError), db._writer.begin() as connection:
        connection.execute(insert(storage.vote).values(**row))
    for change in ({"position": 99}, {"position": 1, "choice": "best"}, {"position": 1, "response_ms": -1}):
        with pytest.raises(IntegrityError), db._writer.begin() as connection:
            connection.execute(insert(storage.vote).values(**row | change))
    assert len(db.votes()) == 1


def test_votes_are_taken_once_in_order_and_from_their_rater(db: Storage, stimuli: Stimuli) -> None:
    mine, other = come(db, stimuli), come(db, stimuli)
    first, second = answer(db, mine, ["left", "tie"])
    _, shown = db.current(mine)
    assert shown is not None
    # the same again, even of an earlier trial, is answered like the first and stores nothing
    assert db.vote(mine, first, "left", 9999, None)[1] == shown
    assert db.vote(mine, second, "tie", 1500, None)[1] == shown
    assert code_of(lambda: db.vote(mine, first, "right", 1500, None)) == "answered"
    assert code_of(lambda: db.vote(other, shown.token, "left", 1500, None)) == "trial"
    with db.engine.connect() as connection:
        later = connection.scalar(
            select(storage.trial.c.token).where(
                (storage.trial.c.rater == db.state(mine).rater) & (storage.trial.c.position == 3)
            )
        )
    assert code_of(lambda: db.vote(mine, str(later), "left", 1500, None)) == "order"
    votes = db.votes()
    assert [(vote["position"], vote["choice"], vote["response_ms"]) for vote in votes] == [
        (0, "left", 1500),
        (1, "tie", 1500),
    ]
    assert all(vote["shown_at"] <= vote["submitted_at"] for vote in votes)


def test_the_last_vote_finishes(db: Storage, stimuli: Stimuli) -> None:
    cookie = come(db, stimuli)
    tokens = answer(db, cookie, ["right"] * 9)
    assert db.state(cookie).finished and db.current(cookie)[1] is None
    assert db.raters()[0]["finished_at"] is not None
    state, shown = db.vote(cookie, tokens[-1], "right", 1500, None)  # sent again after its answer was lost
    assert state.finished and shown is None
    assert code_of(lambda: db.vote(cookie, tokens[-1], "left", 1500, None)) == "answered"


def test_at_once_from_many_threads(db: Storage, stimuli: Stimuli) -> None:
    cookie = come(db, stimuli)
    _, shown = db.current(cookie)
    assert shown is not None
    results: Counter[str] = Counter()
    barrier = threading.Barrier(8)

    def send(number: int) -> None:
        choice: Choice = "left" if number % 2 else "right"
        barrier.wait()
        try:
            db.vote(cookie, shown.token, choice, 1000 + number, None)
            results[choice] += 1
        except Refused as refused:
            results[refused.code] += 1

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(db.votes()) == 1
    assert results == {db.votes()[0]["choice"]: 4, "answered": 4}


def test_raters_who_consent_at_once_get_different_slots(db: Storage, stimuli: Stimuli) -> None:
    cookies = [db.enter(link, None, None) for link in db.invite(3, "test")]
    barrier = threading.Barrier(6)

    def agree(cookie: str) -> None:
        barrier.wait()
        db.consent(cookie, "1", stimuli)

    threads = [threading.Thread(target=agree, args=(cookie,)) for cookie in cookies * 2]  # each clicks twice
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(row["slot"] for row in db.raters()) == [0, 1, 2]
    with db.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM trial")) == 3 * 9


def test_replacements_go_where_votes_are_missing(db: Storage, stimuli: Stimuli) -> None:
    cookies = [come(db, stimuli) for _ in range(3)]
    answer(db, cookies[0], ["left"] * 9)
    answer(db, cookies[2], ["left"] * 9)
    assert db.state(come(db, stimuli)).slot == 1
    assert db.state(come(db, stimuli)).slot == 1
    db.delete(db.state(cookies[2]).rater, "test")
    assert db.state(come(db, stimuli)).slot == 2


def test_consent_comes_first_and_to_the_current_text(db: Storage, stimuli: Stimuli) -> None:
    cookie = db.enter(db.invite(1, "test")[0], None, None)
    assert code_of(lambda: db.current(cookie)) == "consent"
    assert code_of(lambda: db.consent(cookie, "0", stimuli)) == "consent_version"
    assert db.state(cookie).slot is None
    db.consent(cookie, "1", stimuli)
    with db.engine.connect() as connection:
        row = connection.execute(select(storage.rater)).one()
    assert row.consent_version == "1" and row.consent_at >= row.created_at > 1.7e12


def test_image_tokens_are_random_and_only_their_raters(db: Storage, stimuli: Stimuli) -> None:
    mine, other = come(db, stimuli), come(db, stimuli)
    _, shown = db.current(mine)
    assert shown is not None
    assert db.stimulus(mine, shown.left) == (0, 0, 0) and db.stimulus(mine, shown.right) == (0, 0, 1)
    assert code_of(lambda: db.stimulus(other, shown.left)) == "image"
    with db.engine.connect() as connection:
        tokens = [token for row in connection.execute(select(storage.trial)) for token in row[2:5]]
    assert len(set(tokens)) == len(tokens) == 2 * 9 * 3
    assert not set(tokens) & (set(stimuli.manifest.files) | set(stimuli.pairs))


def test_no_secret_and_no_identity_is_stored(db: Storage, stimuli: Stimuli) -> None:
    link = db.invite(1, "test")[0]
    cookie = db.enter(link, None, None)
    db.set_flag("crowd", True, "test")
    person = ("PROLIFIC_PID", "5f3c0ffee0123456789abcde")
    crowd = db.enter(None, person, None)
    assert db.state(db.enter(None, person, None)) == db.state(crowd)  # resumes
    held = everything(db)
    assert link not in held and cookie not in held and person[1] not in held
    assert db.find(person[1]) == db.state(crowd).rater == db.find(db.state(crowd).rater)
    assert db.find("somebody") is None


def test_platform_links_need_to_be_let_in(db: Storage) -> None:
    assert code_of(lambda: db.enter(None, ("PROLIFIC_PID", "abc"), None)) == "closed"
    assert code_of(lambda: db.enter("0" * 32, None, None)) == "link"
    assert code_of(lambda: db.state("0" * 32)) == "session"
    assert db.raters() == []


def test_a_session_is_kept_where_it_is_already_the_raters(db: Storage) -> None:
    one, two = db.invite(2, "test")
    cookie = db.enter(one, None, None)
    assert db.enter(one, None, cookie) == cookie
    assert db.enter(two, None, cookie) != cookie
    assert db.enter(one, None, "0" * 32) != "0" * 32  # a session cannot be chosen by who brings it


def test_pause_stops_votes_but_loses_none(db: Storage, stimuli: Stimuli) -> None:
    cookie = come(db, stimuli)
    answer(db, cookie, ["left"])
    _, shown = db.current(cookie)
    assert shown is not None
    db.set_flag("paused", True, "test")
    assert code_of(lambda: db.vote(cookie, shown.token, "left", 1500, None)) == "paused"
    assert code_of(lambda: db.current(cookie)) == "paused"
    db.set_flag("paused", False, "test")
    db.vote(cookie, shown.token, "left", 1500, None)
    assert [(row["actor"], row["action"], row["detail"]) for row in db.audit_log()[:2]] == [
        ("test", "paused", "off"),
        ("test", "paused", "on"),
    ]


def test_deletion_leaves_nothing(db: Storage, stimuli: Stimuli) -> None:
    gone, stays = come(db, stimuli), come(db, stimuli)
    _, shown = db.current(gone)
    assert shown is not None
    db.vote(gone, shown.token, "problem", 1500, SECRET_TEXT)
    answer(db, stays, ["left"])
    who = db.state(gone).rater
    assert SECRET_TEXT in everything(db)
    assert db.delete(who, "test") == {"votes": 1, "trials": 9, "sessions": 1, "raters": 1}
    assert SECRET_TEXT not in everything(db)
    assert code_of(lambda: db.state(gone)) == "session"
    assert [row["id"] for row in db.raters()] == [db.state(stays).rater] and len(db.votes()) == 1
    assert db.audit_log()[0]["detail"] == f"rater {who}: 1 votes"
    if db.sqlite:  # not in the files' free space either
        folder = Path(str(db.url.database)).parent
        assert not any(SECRET_TEXT.encode() in path.read_bytes() for path in folder.glob("votes.db*"))


def test_votes_on_another_bundle_are_not_mixed(db: Storage, tmp_path: Path) -> None:
    other = Stimuli(write_bundle(tmp_path / "other"))
    with pytest.raises(InvdpoError, match="different stimuli are not mixed"):
        db.bind(other)


def test_what_was_acknowledged_survives_a_kill(db: Storage, stimuli: Stimuli, bundle: Path) -> None:
    """A process that votes as fast as it can is killed; every vote that it said was stored is there."""
    cookies = [come(db, stimuli) for _ in range(30)]
    program = """
import sys
from user_study_app.storage import Storage
db = Storage(sys.argv[1])
for cookie in sys.argv[2:]:
    state, shown = db.current(cookie)
    while shown is not None:
        token = shown.token
        state, shown = db.vote(cookie, token, "left", 1500, None)
        print(token, flush=True)
"""
    url = db.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, "-c", program, url, *cookies], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    acknowledged += process.stdout.read().split()
    process.wait()
    reopened = Storage(url)
    with reopened.engine.connect() as connection:
        stored = connection.execute(
            select(storage.trial.c.token).join(
                storage.vote,
                (storage.vote.c.rater == storage.trial.c.rater) & (storage.vote.c.position == storage.trial.c.position),
            )
        )
        tokens = set(stored.scalars())
    assert set(acknowledged) <= tokens and len(tokens) < 30 * 9
    reopened.close()


# -- addresses of databases


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("votes.db", "is not a database address"),
        ("mysql://host/name", "cannot be kept in 'mysql'"),
        ("sqlite://", "in memory only"),
        ("postgresql://study:hush-hush@127.0.0.1:1/none", "cannot be used"),
        ("sqlite:////proc/none/votes.db", "cannot be written"),
    ],
)
def test_unusable_addresses_are_explained_without_their_password(url: str, words: str) -> None:
    with pytest.raises(InvdpoError, match=words) as caught:
        Storage(url)
    assert "hush-hush" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "votes.db"
    path.write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(InvdpoError, match=r"votes\.db cannot be used: .*not a database"):
        Storage(f"sqlite:///{path}")


def test_the_address_is_the_option_or_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("INVDPO_USER_STUDY_DB", raising=False)
    assert database_url(tmp_path / "bundle") == f"sqlite:///{tmp_path / 'votes.db'}"
    monkeypatch.setenv("INVDPO_USER_STUDY_DB", "postgresql://host/name")
    assert database_url(tmp_path / "bundle") == "postgresql://host/name"
    assert database_url(tmp_path / "bundle", "sqlite:///x.db") == "sqlite:///x.db"


# -- export


def test_export_with_and_without_the_key(url: str, bundle: Path, stimuli: Stimuli, tmp_path: Path) -> None:
    links = offline.invite(url, bundle, 2, "https://study.example/")
    assert all(link.startswith("https://study.example/#") for link in links)
    db = Storage(url)
    for link in links:
        cookie = db.enter(link.rpartition("#")[2], None, None)
        db.consent(cookie, "1", stimuli)
        answer(db, cookie, ["left", "right", "tie"])
        _, shown = db.current(cookie)
        assert shown is not None
        db.vote(cookie, shown.token, "problem", 1500, "=HYPERLINK(1)")
    db.close()
    plain = offline.export(url, bundle, tmp_path / "votes.csv")
    rows = list(csv.DictReader(io.StringIO(plain.read_text())))
    assert tuple(rows[0]) == offline.COLUMNS and len(rows) == 8
    assert not any(name in plain.read_text() for arms in ARMS.values() for name in arms)
    assert rows[3]["problem"] == "'=HYPERLINK(1)" and rows[3]["choice"] == "problem"
    assert rows[0]["kind"] == "practice" and rows[0]["shown_at"] <= rows[0]["submitted_at"]

    key = json.loads((bundle.parent / "key.json").read_text())
    named = offline.export(url, bundle, tmp_path / "votes.jsonl", bundle.parent / "key.json")
    lines = [json.loads(line) for line in named.read_text().splitlines()]
    for line in lines:
        pair = stimuli.pairs[line["pair"]]
        left, right = (pair.images[line["left"]], pair.images[1 - line["left"]])
        assert (line["arm_left"], line["arm_right"]) == (key["images"][left]["arm"], key["images"][right]["arm"])
        assert {line["arm_left"], line["arm_right"]} == set(ARMS[line["group"]])
        assert line["prompt"] == pair.prompt and line["prompt_id"] == key["images"][left]["prompt_id"]
    parquet = offline.export(url, bundle, tmp_path / "votes.parquet", bundle.parent / "key.json")
    assert pyarrow.parquet.read_table(parquet).to_pylist() == lines
    assert [{name: line[name] or None for name in ("rater", "choice", "pair")} for line in lines] == [
        {name: row[name] or None for name in ("rater", "choice", "pair")} for row in rows
    ]
    who = rows[0]["rater"]
    assert offline.delete(url, who)["votes"] == 4
    with pytest.raises(InvdpoError, match="Nobody is known"):
        offline.delete(url, who)


def test_export_names_what_is_wrong(bundle: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'votes.db'}"
    with pytest.raises(InvdpoError, match="csv, jsonl or parquet"):
        offline.export(url, bundle, tmp_path / "votes.xlsx")
    other = write_bundle(tmp_path / "other")
    with pytest.raises(InvdpoError, match="belongs to another bundle"):
        offline.export(url, bundle, tmp_path / "votes.csv", other.parent / "key.json")
    with pytest.raises(InvdpoError, match="not a key"):
        offline.export(url, bundle, tmp_path / "votes.csv", bundle / "manifest.json")
    with pytest.raises(InvdpoError, match="cannot be read"):
        offline.export(url, bundle, tmp_path / "votes.csv", tmp_path / "none.json")
    assert not (tmp_path / "votes.csv").exists()


# -- the bundle as the server reads it


def test_a_changed_bundle_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "a")
    image = next((folder / "images").iterdir())
    content = image.read_bytes()
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InvdpoError, match="hash differs"):
        Stimuli(folder)
    image.unlink()
    with pytest.raises(InvdpoError, match="missing from the bundle"):
        Stimuli(folder)
    with pytest.raises(InvdpoError, match="Make the bundle first"):
        Stimuli(tmp_path / "none")
    folder = write_bundle(tmp_path / "b")
    schedule = json.loads((folder / "schedule.json").read_text())
    schedule["slots"][0]["trials"][1]["left"] ^= 1
    (folder / "schedule.json").write_text(json.dumps(schedule))
    with pytest.raises(InvdpoError, match="not as it was frozen"):
        Stimuli(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(InvdpoError, match="format 2"):
        Stimuli(folder)


def test_images_of_different_lengths_are_refused(tmp_path: Path) -> None:
    import hashlib

    from user_study_app.stimuli import content_hash

    folder = write_bundle(tmp_path)
    manifest, schedule, consent = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "schedule", "consent")
    )
    image = next((folder / "images").iterdir())
    image.write_bytes(image.read_bytes() + b"x")
    manifest["files"][image.stem] = hashlib.sha256(image.read_bytes()).hexdigest()
    manifest["bundle"] = content_hash(manifest, schedule, consent)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvdpoError, match="different lengths"):
        Stimuli(folder)
