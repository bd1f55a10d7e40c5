"""Raters, trials and votes in a database: SQLite in WAL mode in a file, or PostgreSQL by URL.

The database itself enforces one vote per rater and trial. A vote is committed, on SQLite down to the disk, before the
next trial is answered, so what was acknowledged survives a killed server. Secret tokens (links, cookies) are stored
as hashes, crowd platforms' ids as keyed hashes, addresses and e-mails not at all. Times are milliseconds since 1970,
UTC.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from invdpo.errors import InvdpoError
from user_study_app.security import digest, new_token
from user_study_app.stimuli import Side, Stimuli

Choice = Literal["left", "right", "tie", "problem"]
T = TypeVar("T")

metadata = MetaData()

meta = Table(
    "meta",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", Text, nullable=False),
)
rater = Table(
    "rater",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("slot", Integer),
    Column("link_hash", String(64), unique=True),
    Column("platform_hash", String(64), unique=True),
    Column("consent_version", String(64)),
    Column("consent_at", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
)
session = Table(
    "session",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("rater", ForeignKey("rater.id"), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
)
trial = Table(
    "trial",
    metadata,
    Column("rater", ForeignKey("rater.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("token", String(32), nullable=False, unique=True),
    Column("left_token", String(32), nullable=False, unique=True),
    Column("right_token", String(32), nullable=False, unique=True),
    Column("shown_at", BigInteger),
)
vote = Table(
    "vote",
    metadata,
    Column("rater", String(12), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("choice", String(8), CheckConstraint("choice IN ('left', 'right', 'tie', 'problem')"), nullable=False),
    Column("response_ms", Integer, CheckConstraint("response_ms >= 0"), nullable=False),
    Column("problem_text", Text),
    Column("submitted_at", BigInteger, nullable=False),
    ForeignKeyConstraint(["rater", "position"], ["trial.rater", "trial.position"]),
)
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(16), nullable=False),
    Column("action", String(32), nullable=False),
    Column("detail", Text, nullable=False),
)


class Refused(Exception):
    """A rater's request that is not granted: `code` for the page, the message for a person, `retry_after` seconds."""

    def __init__(self, code: str, status: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code, self.status, self.retry_after = code, status, retry_after


UNKNOWN = ("session", 401, "This link is not known here. Please open the link you were given again.")
PAUSED = ("paused", 423, "The study is paused. Your answers are saved; please come back later with the same link.")


@dataclass(frozen=True)
class State:
    """Where a rater is. `answered` counts votes, practice included; `slot` is None before consent."""

    rater: str
    slot: int | None
    answered: int
    finished: bool
    paused: bool


@dataclass(frozen=True)
class Shown:
    """The trial a rater is at, and the images of the one after it (None at the end)."""

    position: int
    token: str
    left: str
    right: str
    following: tuple[str, str] | None


def now_ms() -> int:
    """The wall clock, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def database_url(bundle: Path, given: str | None = None) -> str:
    """The database to use: the one given, else INVDPO_USER_STUDY_DB, else a SQLite file next to the bundle."""
    return given or os.environ.get("INVDPO_USER_STUDY_DB") or f"sqlite:///{bundle.parent / 'votes.db'}"


def _parse(url: str) -> URL:
    wanted = "Give sqlite:///path/to/file.db or postgresql://user:password@host/name."
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvdpoError(f"{url!r} is not a database address. {wanted}") from None
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise InvdpoError(f"The study cannot be kept in {backend!r}. {wanted}")
    if not parsed.database or parsed.database == ":memory:":
        raise InvdpoError(f"{url!r} keeps votes in memory only, they would be lost. {wanted}")
    return parsed


class Storage:
    """The study's database. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        self.url = _parse(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if self.sqlite:
            path = Path(str(self.url.database))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)  # who took part and what they chose is nobody else's business
            except OSError as error:
                raise InvdpoError(f"The database {path} cannot be written: {error.strerror}.") from error
        # As many connections as the web server has threads; a rater must not wait for a pool.
        self.engine = create_engine(self.url, pool_size=10, max_overflow=40, pool_pre_ping=not self.sqlite)
        if self.sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._writer = self.engine.execution_options(write=True)
        try:
            self._migrate()
        except CommandError as error:
            raise InvdpoError(
                f"The database {self.name} was made by a newer version of this code ({error}). Use that version."
            ) from error
        except SQLAlchemyError as error:
            # The driver's message may hold the address with its password; the database's own text does not.
            reason = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0]
            raise InvdpoError(f"The database {self.name} cannot be used: {reason}") from error

    @property
    def name(self) -> str:
        """The database for people to read, without its password."""
        return self.url.render_as_string(hide_password=True)

    def _migrate(self) -> None:
        config = Config()
        folder = Path(__file__).parent / "migrations"
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        with self._writer.begin() as connection:
            if not self.sqlite:
                # Two processes may start on a new database at once; the second waits here.
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(684120701)")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Give every connection back."""
        self.engine.dispose()

    def _write(self, action: Callable[[Connection], T]) -> T:
        """Run `action` in a transaction of its own, committed when this returns.

        Where another process was faster with the same row the action runs once more and finds it there.
        """
        try:
            with self._writer.begin() as connection:
                return action(connection)
        except IntegrityError:
            with self._writer.begin() as connection:
                return action(connection)

    # -- the study as a whole

    def bind(self, stimuli: Stimuli) -> None:
        """Tie a new database to the bundle; raise InvdpoError where it already holds votes on another one."""

        def action(connection: Connection) -> str:
            known = _meta(connection, "bundle")
            if known is None:
                connection.execute(insert(meta).values(name="bundle", value=stimuli.bundle))
                connection.execute(insert(meta).values(name="secret", value=secrets.token_hex(32)))
            return known or stimuli.bundle

        known = self._write(action)
        if known != stimuli.bundle:
            raise InvdpoError(
                f"The database {self.name} holds votes on the bundle {known[:12]}…, and {stimuli.folder} is "
                f"{stimuli.bundle[:12]}…. Votes on different stimuli are not mixed: give another --database, or the "
                "bundle the study was started with."
            )

    def flag(self, name: Literal["paused", "crowd"]) -> bool:
        """Whether the study is paused, or open to links of crowd platforms."""
        with self.engine.connect() as connection:
            return _meta(connection, name) == "1"

    def set_flag(self, name: Literal["paused", "crowd"], on: bool, actor: str) -> None:
        """Pause or resume the study; open or close it to crowd platforms."""

        def action(connection: Connection) -> None:
            if _meta(connection, name) is None:
                connection.execute(insert(meta).values(name=name, value="0"))
            connection.execute(update(meta).where(meta.c.name == name).values(value="1" if on else "0"))
            _note(connection, actor, name, "on" if on else "off")

        self._write(action)

    def note(self, actor: str, action: str, detail: str = "") -> None:
        """Add a line to the audit log."""
        self._write(lambda connection: _note(connection, actor, action, detail))

    def audit_log(self, last: int = 200) -> list[dict[str, Any]]:
        """The newest lines of the audit log, newest first: at, actor, action, detail."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(audit).order_by(audit.c.id.desc()).limit(last))
            return [dict(row) for row in rows.mappings()]

    # -- who takes part

    def invite(self, count: int, actor: str) -> list[str]:
        """Make `count` places and return their secret link tokens, which are not stored and not shown again."""
        tokens = [new_token() for _ in range(count)]

        def action(connection: Connection) -> None:
            rows = [{"id": _rater_id(), "link_hash": digest(token), "created_at": now_ms()} for token in tokens]
            if rows:
                connection.execute(insert(rater), rows)
            _note(connection, actor, "invite", f"{count} links")

        self._write(action)
        return tokens

    def enter(self, link: str | None, platform: tuple[str, str] | None, cookie: str | None) -> str:
        """A session token for the rater of a link, or of a platform's participant id (name of the field, value).

        The cookie's own token is returned where it already belongs to that rater. Raises Refused.
        """

        def action(connection: Connection) -> str:
            if link is not None:
                who = connection.scalar(select(rater.c.id).where(rater.c.link_hash == digest(link)))
                if who is None:
                    raise Refused("link", 404, "This link is not known here. Please check that it is complete.")
            elif platform is not None:
                if _meta(connection, "crowd") != "1":
                    raise Refused("closed", 403, "This study takes part by personal link only.")
                hashed = _platform_hash(connection, platform)
                who = connection.scalar(select(rater.c.id).where(rater.c.platform_hash == hashed))
                if who is None:
                    who = _rater_id()
                    connection.execute(insert(rater).values(id=who, platform_hash=hashed, created_at=now_ms()))
            else:
                raise Refused("link", 400, "Please open this page with the link you were given.")
            if cookie is not None:
                owner = connection.scalar(select(session.c.rater).where(session.c.token_hash == digest(cookie)))
                if owner == who:
                    return cookie
            token = new_token()
            connection.execute(insert(session).values(token_hash=digest(token), rater=who, created_at=now_ms()))
            return token

        return self._write(action)

    def state(self, cookie: str) -> State:
        """Where the rater of a session is. Raises Refused where there is no such session."""
        with self.engine.connect() as connection:
            return _state(connection, cookie)

    def consent(self, cookie: str, version: str, stimuli: Stimuli) -> State:
        """Record consent and give the rater a slot of the schedule with fresh random tokens. Doing it twice is once.

        The slot is the one that the fewest have finished, then the fewest have started: replacements of raters who
        left go where votes are missing.
        """

        def action(connection: Connection) -> State:
            # One at a time (SQLite's writers already are), or two raters would count the same places.
            connection.execute(select(meta.c.value).where(meta.c.name == "bundle").with_for_update())
            state = _state(connection, cookie)
            if state.paused:
                raise Refused(*PAUSED)
            if state.slot is not None:
                return state
            if version != stimuli.texts.version:
                raise Refused("consent_version", 409, "The consent text has changed. Please load the page again.")
            taken = connection.execute(
                select(rater.c.slot, func.count(rater.c.finished_at), func.count())
                .where(rater.c.slot.is_not(None))
                .group_by(rater.c.slot)
            )
            uses = {slot: (finished, started) for slot, finished, started in taken}
            slot = min(stimuli.slots, key=lambda slot: (uses.get(slot, (0, 0)), slot))
            connection.execute(
                update(rater)
                .where(rater.c.id == state.rater)
                .values(slot=slot, consent_version=version, consent_at=now_ms())
            )
            connection.execute(
                insert(trial),
                [
                    {
                        "rater": state.rater,
                        "position": position,
                        "token": new_token(),
                        "left_token": new_token(),
                        "right_token": new_token(),
                    }
                    for position in range(len(stimuli.slots[slot]))
                ],
            )
            return _state(connection, cookie)

        return self._write(action)

    # -- trials and votes

    def current(self, cookie: str) -> tuple[State, Shown | None]:
        """The trial a rater is at, None where all are answered. Raises Refused before consent and while paused."""

        def action(connection: Connection) -> tuple[State, Shown | None]:
            state = _ready(connection, cookie)
            return state, _show(connection, state)

        return self._write(action)

    def vote(
        self, cookie: str, token: str, choice: Choice, response_ms: int, problem_text: str | None
    ) -> tuple[State, Shown | None]:
        """Store the vote on the trial that was displayed, and return the next one.

        The same choice sent again changes nothing and is answered like the first. Raises Refused for a token that is
        not this rater's, a trial whose turn has not come, and another choice on an answered trial.
        """

        def action(connection: Connection) -> tuple[State, Shown | None]:
            state = _ready(connection, cookie)
            mine = (trial.c.rater == state.rater) & (trial.c.token == token)
            position = connection.scalar(select(trial.c.position).where(mine))
            if position is None:
                raise Refused("trial", 404, "This pair is not one of yours.")
            if position > state.answered:
                raise Refused("order", 409, "This pair's turn has not come yet.")
            if position < state.answered:
                before = connection.scalar(
                    select(vote.c.choice).where((vote.c.rater == state.rater) & (vote.c.position == position))
                )
                if before != choice:
                    raise Refused("answered", 409, "You have already answered this pair; your first answer was kept.")
                return state, _show(connection, state)
            connection.execute(
                insert(vote).values(
                    rater=state.rater,
                    position=position,
                    choice=choice,
                    response_ms=response_ms,
                    problem_text=problem_text,
                    submitted_at=now_ms(),
                )
            )
            state = State(state.rater, state.slot, position + 1, False, False)
            shown = _show(connection, state)
            if shown is None:
                connection.execute(update(rater).where(rater.c.id == state.rater).values(finished_at=now_ms()))
                state = State(state.rater, state.slot, position + 1, True, False)
            return state, shown

        return self._write(action)

    def stimulus(self, cookie: str, token: str) -> tuple[int, int, Side]:
        """Slot, position and side (0 left, 1 right) of an image token of this session's rater. Raises Refused."""
        with self.engine.connect() as connection:
            row = connection.execute(
                select(rater.c.slot, trial.c.position, trial.c.left_token)
                .join_from(session, rater, rater.c.id == session.c.rater)
                .join(trial, trial.c.rater == rater.c.id)
                .where(session.c.token_hash == digest(cookie))
                .where((trial.c.left_token == token) | (trial.c.right_token == token))
            ).one_or_none()
        if row is None or row.slot is None:
            raise Refused("image", 404, "There is no such image.")
        return row.slot, row.position, 0 if row.left_token == token else 1

    # -- for the experimenter

    def raters(self) -> list[dict[str, Any]]:
        """One row a rater: id, slot, platform (bool), consent_at, created_at, finished_at; in order of creation."""
        columns = (
            rater.c.id,
            rater.c.slot,
            rater.c.platform_hash.is_not(None).label("platform"),
            rater.c.consent_at,
            rater.c.created_at,
            rater.c.finished_at,
        )
        with self.engine.connect() as connection:
            rows = connection.execute(select(*columns).order_by(rater.c.created_at, rater.c.id))
            return [dict(row) for row in rows.mappings()]

    def votes(self) -> list[dict[str, Any]]:
        """One row a vote, by rater and position: rater, slot, consent_version, position, choice, response_ms,
        problem_text, submitted_at, shown_at."""
        query = (
            select(
                vote.c.rater,
                rater.c.slot,
                rater.c.consent_version,
                vote.c.position,
                vote.c.choice,
                vote.c.response_ms,
                vote.c.problem_text,
                vote.c.submitted_at,
                trial.c.shown_at,
            )
            .join_from(vote, rater, rater.c.id == vote.c.rater)
            .join(trial, (trial.c.rater == vote.c.rater) & (trial.c.position == vote.c.position))
            .order_by(vote.c.rater, vote.c.position)
        )
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def find(self, who: str) -> str | None:
        """The rater of a participant number, or of a crowd platform's id (in its field of any known name)."""
        who = who.strip()
        with self.engine.connect() as connection:
            by_id = connection.scalar(select(rater.c.id).where(rater.c.id == who))
            if by_id:
                return by_id
            hashes = [_platform_hash(connection, (field, who)) for field in PLATFORM_FIELDS]
            return connection.scalar(select(rater.c.id).where(rater.c.platform_hash.in_(hashes)))

    def delete(self, who: str, actor: str) -> dict[str, int]:
        """Delete all that is known of a rater; the audit log keeps the number and the counts returned here."""

        def action(connection: Connection) -> dict[str, int]:
            counts = {
                name: connection.execute(delete(table).where(table.c.rater == who)).rowcount
                for name, table in (("votes", vote), ("trials", trial), ("sessions", session))
            }
            counts["raters"] = connection.execute(delete(rater).where(rater.c.id == who)).rowcount
            if counts["raters"]:
                _note(connection, actor, "delete", f"rater {who}: {counts['votes']} votes")
            return counts

        counts = self._write(action)
        if self.sqlite:
            # What was deleted would otherwise stay readable in the log file until later writes cover it.
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        return counts


# The field that names a person on each platform; the other fields of its links are not kept.
PLATFORM_FIELDS = ("PROLIFIC_PID", "workerId", "participantId")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads before it writes must hold the write lock from the start, or it fails when it upgrades.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("write") else "BEGIN")


def _rater_id() -> str:
    return secrets.token_hex(6)


def _meta(connection: Connection, name: str) -> str | None:
    return connection.scalar(select(meta.c.value).where(meta.c.name == name))


def _note(connection: Connection, actor: str, action: str, detail: str) -> None:
    connection.execute(insert(audit).values(at=now_ms(), actor=actor, action=action, detail=detail))


def _platform_hash(connection: Connection, platform: tuple[str, str]) -> str:
    secret = _meta(connection, "secret") or ""
    return hmac.new(bytes.fromhex(secret), "=".join(platform).encode(), hashlib.sha256).hexdigest()


def _state(connection: Connection, cookie: str) -> State:
    answered = select(func.max(vote.c.position)).where(vote.c.rater == rater.c.id).scalar_subquery()
    paused = select(meta.c.value).where(meta.c.name == "paused").scalar_subquery()
    row = connection.execute(
        select(rater.c.id, rater.c.slot, rater.c.finished_at, answered.label("last"), paused.label("paused"))
        .join_from(session, rater, rater.c.id == session.c.rater)
        .where(session.c.token_hash == digest(cookie))
    ).one_or_none()
    if row is None:
        raise Refused(*UNKNOWN)
    answered = 0 if row.last is None else row.last + 1
    return State(row.id, row.slot, answered, row.finished_at is not None, row.paused == "1")


def _ready(connection: Connection, cookie: str) -> State:
    state = _state(connection, cookie)
    if state.slot is None:
        raise Refused("consent", 403, "Please read and accept the consent page first.")
    if state.paused and not state.finished:
        raise Refused(*PAUSED)
    return state


def _show(connection: Connection, state: State) -> Shown | None:
    """The trial at `state.answered`, marked as shown now unless it was shown before."""
    rows = connection.execute(
        select(trial)
        .where((trial.c.rater == state.rater) & trial.c.position.in_((state.answered, state.answered + 1)))
        .order_by(trial.c.position)
    ).all()
    if not rows:
        return None
    row = rows[0]
    if row.shown_at is None:
        connection.execute(
            update(trial)
            .where((trial.c.rater == state.rater) & (trial.c.position == row.position))
            .values(shown_at=now_ms())
        )
    following = (rows[1].left_token, rows[1].right_token) if len(rows) > 1 else None
    return Shown(row.position, row.token, row.left_token, row.right_token, following)
