"""Shards on the web: fetched once, whole or not at all, by however many processes. The web is a thread here."""

import multiprocessing
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fpdm.data import Shards, fetch
from fpdm.data.fetch import fetched
from tests.data.pictures import number_of
from tests.data.test_shards import write_shards

CONTENT = bytes(range(256)) * 1000


class Web(ThreadingHTTPServer):
    """files    path -> content
    faults   path -> what becomes of the first requests: a status, "cut" for half of the content, "chunks" for half of
             it in chunks without an end, "closed" for no answer at all
    asked    paths, in order
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked, self.delay = {}, {}, [], 0.0

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *text):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/")
        self.server.asked.append(path)
        time.sleep(self.server.delay)
        self.close_connection = True
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults else None
        if fault == "closed":
            return
        content = self.server.files.get(path, b"")
        status = fault if isinstance(fault, int) else 200 if path in self.server.files else 404
        self.send_response(status)
        if fault == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(content) + content[: len(content) // 2])
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.setenv("FPDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    server = Web()
    server.files["a.tar"] = CONTENT
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def left_in(cache):
    """What is there, but for locks."""
    return [path.name for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_file_is_fetched_once(web, tmp_path):
    path = fetched(web.url("a.tar"))
    assert path == fetched(web.url("a.tar"))
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    assert path.name.endswith("-a.tar")
    assert web.asked == ["a.tar"]


def test_one_name_in_two_places_is_two_files(web):
    web.files["b/a.tar"] = b"other"
    assert fetched(web.url("a.tar")).read_bytes() == CONTENT
    assert fetched(web.url("b/a.tar")).read_bytes() == b"other"
    assert fetched(web.url("a.tar?version=2")).name.endswith("-a.tar")
    assert len(web.asked) == 3


@pytest.mark.parametrize("fault", ["cut", "chunks", "closed", 500, 503, 429])
def test_what_is_interrupted_is_tried_again(web, fault, tmp_path):
    web.faults["a.tar"] = [fault, fault]
    path = fetched(web.url("a.tar"))
    assert path.read_bytes() == CONTENT
    assert len(web.asked) == 3
    assert left_in(tmp_path / "cache") == [path.name]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("cut", "ended after 128000 of 256000 bytes"),
        ("chunks", "IncompleteRead"),
        ("closed", "."),
        (503, "answers 503"),
    ],
)
def test_what_is_interrupted_thrice_is_named_and_nothing_is_left(web, fault, text, tmp_path):
    web.faults["a.tar"] = [fault] * 3
    with pytest.raises(ValueError, match=f"{web.url('a.tar')} cannot be fetched, tried 3 times: .*{text}"):
        fetched(web.url("a.tar"))
    assert left_in(tmp_path / "cache") == []
    assert fetched(web.url("a.tar")).read_bytes() == CONTENT  # the next command


@pytest.mark.parametrize(("fault", "text"), [(404, "404 Not Found"), (403, "403 Forbidden")])
def test_what_is_refused_is_not_asked_for_again(web, fault, text):
    web.faults["a.tar"] = [fault]
    with pytest.raises(ValueError, match=f"{web.url('a.tar')} cannot be fetched: the server answers {text}"):
        fetched(web.url("a.tar"))
    assert web.asked == ["a.tar"]


def test_where_no_server_is(web):
    url = web.url("a.tar").replace(str(web.server_port), "9")  # a port at which nobody is
    with pytest.raises(ValueError, match=r"tried 3 times: .*refused"):
        fetched(url)


def test_a_full_disk_is_not_a_matter_of_the_network(web, monkeypatch):
    def full(url):
        yield b"a"
        raise OSError(28, "No space left on device")  # as the file would

    monkeypatch.setattr(fetch, "_parts", full)
    with pytest.raises(OSError, match="No space left"):
        fetched(web.url("a.tar"))


def test_several_processes_fetch_once(web):
    web.delay = 0.3
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=fetched, args=(web.url("a.tar"),)) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert fetched(web.url("a.tar")).read_bytes() == CONTENT
    assert web.asked == ["a.tar"]


def test_shards_on_the_web_are_those_on_the_disk(web, tmp_path):
    folder = write_shards(tmp_path / "data", 3, 2)
    web.files = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    source, local = Shards(web.url("data-{000..001}.tar")), Shards(folder)
    assert (source.fingerprint, source.chunks) == (local.fingerprint, local.chunks)
    assert [number_of(source.load(i)[0]) for i in range(5)] == list(range(5))
    assert source.class_names == ["0", "1", "2"]
    assert web.asked == ["data-000.tar", "data-001.tar", "classes.json", "classes.txt"]
    assert Shards(web.url("data-{000..001}.tar")).names == source.names
    assert len(web.asked) == 4  # that there are no names is known, too


def test_names_of_classes_on_the_web(web, tmp_path):
    web.files = {
        "some/where/a.tar": (write_shards(tmp_path / "data", 3) / "data-000.tar").read_bytes(),
        "some/where/classes.txt": b"ant\ncat\ndog\n",
    }
    assert Shards(web.url("some/where/a.tar?download=true")).class_names == ["ant", "cat", "dog"]


def test_a_shard_that_is_not_on_the_web_is_named(web, tmp_path):
    web.files["data-000.tar"] = (write_shards(tmp_path / "data", 1) / "data-000.tar").read_bytes()
    with pytest.raises(ValueError, match=r"data-001\.tar cannot be fetched: .*404"):
        Shards(web.url("data-{000..001}.tar"))
