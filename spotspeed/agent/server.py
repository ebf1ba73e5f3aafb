"""The saver of a node: serves ranks, and leaves when nobody is left and all is stored."""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from spotspeed.agent.arena import SlotArena, create_arena
from spotspeed.agent.choosing import Chooser
from spotspeed.agent.incoming import SaveProgress, State
from spotspeed.agent.node_tier import NodeTier
from spotspeed.agent.process import NICE, lower_priority, weigh_session
from spotspeed.agent.sealing import Sealer
from spotspeed.agent.session import Session
from spotspeed.agent.writing import encoder_threads
from spotspeed.core.saver_protocol import (
    PREAMBLE_BYTES,
    PROTOCOL_VERSION,
    Decoder,
    Drained,
    Hello,
    Noticed,
    Notify,
    Progress,
    Refused,
    Welcome,
    decode_preamble,
    encode,
    encode_preamble,
)
from spotspeed.errors import FormatError, PoolExhaustedError, SpotSpeedError
from spotspeed.staging.pool import available_memory_bytes
from spotspeed.storage import open_storage

LINGER_S = 2.0
"""How long the saver stays when nobody is connected and nothing is left to store."""
FIRST_LINGER_S = 10.0
"""The same before the first session, whose rank has just started this process."""
GREETING_TIMEOUT_S = 10.0
PROGRESS_S = 0.5
HISTORY = 256
_TICK_S = 0.2
_UCRED = struct.Struct("3i")
_logger = logging.getLogger("spotspeed")


class Server:
    """Accepts sessions at `listener` and stores what they stage in the store at `url`."""

    def __init__(self, listener: socket.socket, url: str) -> None:
        self.encoders = ThreadPoolExecutor(
            encoder_threads(), thread_name_prefix="encoder", initializer=lower_priority
        )
        self.chooser = Chooser(url, encoder_threads())
        self.urgent_encoders = ThreadPoolExecutor(encoder_threads(), thread_name_prefix="urgent")
        self._listener = listener
        self._sessions: set[Session] = set()
        self._seen_off: list[socket.socket] = []
        self._greeting = 0
        self._active: list[SaveProgress] = []
        self._history: deque[SaveProgress] = deque(maxlen=HISTORY)
        self._lock = threading.Lock()
        self._tiers: dict[str, NodeTier] = {}
        self._tiers_lock = threading.Lock()
        self._is_leaving = False
        self._obstacle = ""
        try:
            self.storage = open_storage(url)
            self.sealer = Sealer(self.storage)
        except SpotSpeedError as error:
            _logger.error("%s cannot be opened: %s", url, error)
            self._obstacle = str(error)

    def run(self) -> None:
        """Serve until there is nothing to do; the socket's name is free on return."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        deadline = time.monotonic() + FIRST_LINGER_S
        while True:
            if poller.poll(_TICK_S * 1000):
                connection, _ = self._listener.accept()
                with self._lock:
                    self._greeting += 1
                threading.Thread(target=self._attend, args=(connection,), daemon=True).start()
            now = time.monotonic()
            with self._lock:
                self._active = [save for save in self._active if not save.is_settled]
                if self._sessions or self._greeting or self._active:
                    deadline = now + LINGER_S
                elif now > deadline or self._is_leaving:
                    self._listener.close()
                    break
        for tier in self._tiers.values():
            tier.close()

    def began(self, save: SaveProgress) -> None:
        """Stay until `save` is settled, and remember it for the answers to drains."""
        with self._lock:
            self._active.append(save)
            self._history.append(save)

    def tier(self, local_path: str) -> NodeTier:
        """The tier below `local_path`; what earlier savers left there begins to be drained.

        One that cannot be used now is tried again by each save.
        """
        with self._tiers_lock:
            if local_path not in self._tiers:
                self._tiers[local_path] = NodeTier(local_path, self)
            tier = self._tiers[local_path]
            try:
                tier.open()
            except SpotSpeedError as error:
                _logger.warning("%s cannot be used for now: %s", local_path, error)
            return tier

    def drain(self, before_epoch: int, session: Session) -> None:
        """Tell `session` how far the older saves are, until all are settled."""
        while True:
            with self._lock:
                older = [save for save in self._history if save.epoch < before_epoch]
                waiting = [save for save in self._active if save.epoch < before_epoch]
            waiting = [save for save in waiting if not save.is_settled]
            if not waiting:
                session.send(_outcomes(older))
                return
            left = sum(save.bytes_left for save in waiting)
            if not session.send(Progress(len(waiting), left)):
                return
            time.sleep(PROGRESS_S)

    def notify(self, message: Notify) -> None:
        """Pass a notice on to every session."""
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.send(Noticed(message.deadline_s, message.source))

    def _attend(self, connection: socket.socket) -> None:
        """Body of a connection's thread: greet, then serve the session."""
        opened: tuple[Session, Decoder] | None = None
        try:
            opened = self._greet(connection)
        except (OSError, SpotSpeedError) as error:
            _logger.info("a connection ended before it was a session: %s", error)
            connection.close()
        finally:
            with self._lock:
                self._greeting -= 1
                if opened is not None:
                    self._sessions.add(opened[0])
        if opened is None:
            return
        session, decoder = opened
        try:
            session.serve(self, decoder)
        finally:
            with self._lock:
                self._sessions.discard(session)

    def _greet(self, connection: socket.socket) -> tuple[Session, Decoder] | None:
        """Check who it is and open a session; None when it waits for this process to leave."""
        connection.settimeout(GREETING_TIMEOUT_S)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        peer_pid, uid, _ = _UCRED.unpack(credentials)
        if uid != os.getuid():
            raise FormatError(f"user {uid} connected to the saver of user {os.getuid()}")
        connection.sendall(encode_preamble(os.getpid()))
        version, pid = decode_preamble(_receive(connection, PREAMBLE_BYTES))
        if version != PROTOCOL_VERSION:
            _logger.warning("process %d speaks protocol %d: leaving when done", pid, version)
            self._is_leaving = True
            self._seen_off.append(connection)
            return None
        decoder = Decoder()
        hello = _hello(connection, decoder)
        if self._is_leaving:
            reason = f"saver process {os.getpid()} leaves when its work is done"
            connection.sendall(encode(Refused("leaving", reason)))
            self._seen_off.append(connection)
            return None
        if self._obstacle:
            self._is_leaving = True
            connection.sendall(encode(Refused("storage", self._obstacle)))
            raise FormatError("there is no store to write to")
        try:
            arena = create_arena(hello, available_memory_bytes())
        except PoolExhaustedError as error:
            connection.sendall(encode(Refused("memory", str(error))))
            raise
        with self._lock:
            if not self._sessions:
                weigh_session(NICE)  # What an earlier notice has set does not count any more.
        _welcome(connection, arena)
        return Session(connection, peer_pid, hello, arena), decoder


def _outcomes(saves: list[SaveProgress]) -> Drained:
    by_state: dict[State, dict[str, None]] = {"sealed": {}, "stored": {}, "failed": {}}
    for save in saves:
        if save.state in by_state:
            by_state[save.state][save.directory] = None
    return Drained(tuple(by_state["sealed"]), tuple(by_state["stored"]), tuple(by_state["failed"]))


def _welcome(connection: socket.socket, arena: SlotArena | None) -> None:
    pid = os.getpid()
    if arena is None:
        connection.sendall(encode(Welcome(pid, 0, 0)))
        return
    message = encode(Welcome(pid, arena.size_bytes, arena.slot_bytes))
    socket.send_fds(connection, [message], [arena.descriptor])
    arena.prefault()


def _hello(connection: socket.socket, decoder: Decoder) -> Hello:
    """The first message of a session; whatever comes with it stays in the decoder."""
    while data := connection.recv(1):
        for message in decoder.feed(data):
            if isinstance(message, Hello):
                return message
            raise FormatError(f"a session began with {type(message).__name__}")
    raise FormatError("hung up before it said hello")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        received = connection.recv(size - len(data))
        if not received:
            raise FormatError("hung up during the greeting")
        data += received
    return data
