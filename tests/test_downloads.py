"""Downloads from a server on loopback that breaks in every way a server breaks: the file whole, or one line."""

import hashlib
import http.server
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from written import save_weights

from common import checkpoints, weights
from common.architectures.resnet import ResNetSpec
from common.errors import DownloadError, WeightsError
from common.sources import downloads, known_weights
from common.sources import hub as hub_module
from common.sources.downloads import fetch
from common.sources.known_weights import KnownWeights, table

CONTENT = bytes(range(256)) * 4096 * 3  # three chunks of a download
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Reply:
    """How the server answers a request for one path; `cuts` gives, per attempt, how many bytes come before a break."""

    body: bytes = CONTENT
    status: int = 200
    headers: dict = field(default_factory=lambda: {"ETag": '"one"'})
    cuts: list = field(default_factory=list)
    ranges: bool = True
    length: bool = True
    pause: float = 0.0  # seconds before each chunk
    hang: bool = False  # when cut, hold the connection open instead of closing it


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        if self.server.down:
            self.close_connection = True
            return
        found = self.server.replies.get(self.path.partition("?")[0], Reply(b"", 404))
        reply = found() if callable(found) else found
        start = self.start(reply)
        body = reply.body[start:]
        self.send_response(206 if start else reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(reply.body) - 1}/{len(reply.body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.send_body(reply, body)

    def start(self, reply):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (reply.headers.get("ETag"), reply.headers.get("Last-Modified"))
        return int(asked[1]) if asked and reply.ranges and same else 0

    def send_body(self, reply, body):
        cut = reply.cuts.pop(0) if reply.cuts else None
        end = len(body) if cut is None else cut
        try:
            for begin in range(0, end, 1 << 16):
                time.sleep(reply.pause)
                self.wfile.write(body[begin : min(begin + (1 << 16), end)])
            if cut is not None:
                self.wfile.flush()
                if reply.hang:
                    self.server.released.wait(60)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side has gone
            self.close_connection = True

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.seen, self.released = {}, [], threading.Event()
        self.down = False

    def stop(self):
        """Close the door, and answer nobody who is inside."""
        self.down = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self, path):
        """The start of each GET of a path."""
        return [headers.get("Range") for command, seen, headers in self.seen if (command, seen) == ("GET", path)]


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("RESNET_PARITY_CACHE", str(folder))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "_TIMEOUT", (2, 2))
    return folder


@pytest.fixture
def known(server, monkeypatch):
    """torchvision:resnet50:IMAGENET1K_V2 as the loopback server's."""
    entry = KnownWeights(
        reference="torchvision:resnet50:IMAGENET1K_V2",
        variant="resnet50",
        url=f"{server.url}/resnet50-{SHA256[:8]}.pth",
        checksum=f"sha256:{SHA256[:8]}",
        preprocessing="torchvision_v2",
    )
    monkeypatch.setattr(known_weights, "table", lambda: (entry,))
    server.replies[f"/resnet50-{SHA256[:8]}.pth"] = Reply()
    return entry


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def refused(reference, cache, **options):
    """The message of the error raised: one line, and nothing in the cache."""
    with pytest.raises(DownloadError) as caught:
        fetch(reference, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not cache.exists() or files(cache) == []
    assert isinstance(caught.value, WeightsError)
    return message


class TestKnown:
    def test_it_is_downloaded_once_checked_and_kept_under_its_own_name(self, server, known, cache):
        first = fetch("torchvision:IMAGENET1K_V2", variant="resnet50")
        again = fetch("torchvision:resnet50:IMAGENET1K_V2")
        assert first.path.read_bytes() == CONTENT
        assert first == again
        assert first.known == known
        assert first.notes == ()
        assert files(cache) == [f"resnet50-{SHA256[:8]}.pth"]
        assert len(server.seen) == 1

    def test_its_url_is_known_too(self, known):
        assert fetch(known.url).known == known

    def test_a_whole_checksum_behind_its_url_counts_more_than_the_few_digits_known(self, known, cache):
        assert fetch(f"{known.url}#sha256={SHA256}").notes == ()
        with pytest.raises(DownloadError, match="damaged on the way"):
            fetch(f"{known.url}#sha256={SHA256[:8]}{'0' * 56}")

    def test_another_content_than_was_published_is_refused(self, server, known, cache):
        server.replies[f"/resnet50-{SHA256[:8]}.pth"] = Reply(CONTENT[:-1] + b"!")
        message = refused("torchvision:resnet50:IMAGENET1K_V2", cache)
        assert f"and not {SHA256[:8]}: damaged on the way" in message
        assert message.endswith("nothing was kept")

    def test_a_copy_damaged_in_the_cache_is_downloaded_again_and_that_is_said(self, known):
        path = fetch(known.reference).path
        path.write_bytes(CONTENT[:-5])
        fetched = fetch(known.reference)
        assert fetched.path.read_bytes() == CONTENT
        assert fetched.notes == (f"{path}: the copy in the cache was damaged; downloaded again",)

    def test_a_damaged_copy_is_not_used_when_the_server_is_gone(self, server, known, cache):
        path = fetch(known.reference).path
        path.write_bytes(CONTENT[:-5])
        server.replies.clear()
        with pytest.raises(DownloadError, match="answered 404"):
            fetch(known.reference)

    def test_what_is_in_the_cache_is_used_without_writing_there(self, known, monkeypatch):
        path = fetch(known.reference).path
        monkeypatch.setattr(downloads, "_lock", None)
        assert fetch(known.reference).path == path

    @pytest.mark.parametrize(
        ("reference", "variant", "expected"),
        [
            ("torchvision:IMAGENET1K_V1", "resnet50", "no such weights of resnet50; there are IMAGENET1K_V2"),
            ("torchvision:IMAGENET1K_V2", "resnet56", "has published no weights of resnet56"),
            ("torchvision:IMAGENET1K_V3", "resnet50.paper", "no such weights of resnet50; there are IMAGENET1K_V2"),
            ("torchvision:IMAGENET1K_V2", None, "of which network? write torchvision:resnet50:IMAGENET1K_V2"),
            ("torchvision:resnet50:IMAGENET1K_V2", "resnet18", "these are weights of resnet50, and the network is"),
            ("torchvision:", "resnet50", "no such weights of resnet50"),
        ],
    )
    def test_a_name_that_is_not_in_the_table_is_answered_with_those_that_are(
        self, known, cache, reference, variant, expected
    ):
        assert expected in refused(reference, cache, variant=variant)


class TestURL:
    def test_a_file_without_a_known_checksum_is_called_unverified(self, server, cache):
        server.replies["/some.pth"] = Reply()
        fetched = fetch(f"{server.url}/some.pth")
        assert fetched.path.read_bytes() == CONTENT
        assert fetched.known is None
        (note,) = fetched.notes
        assert "unverified" in note
        assert note.endswith(f"#sha256={SHA256}")
        assert fetch(f"{server.url}/some.pth") == fetched
        assert len(server.seen) == 1

    @pytest.mark.parametrize("fragment", [f"sha256={SHA256}", f"md5={hashlib.md5(CONTENT).hexdigest()}"])
    def test_a_checksum_behind_it_is_checked(self, server, cache, fragment):
        server.replies["/some.pth"] = Reply()
        assert fetch(f"{server.url}/some.pth#{fragment}").notes == ()
        server.replies["/other.pth"] = Reply(CONTENT[1:])
        with pytest.raises(DownloadError, match="damaged on the way"):
            fetch(f"{server.url}/other.pth#{fragment}")
        assert len(files(cache)) == 1

    @pytest.mark.parametrize("fragment", ["sha256=12", "sha1=" + "0" * 40, "x"])
    def test_a_checksum_that_is_none_is_refused(self, server, cache, fragment):
        server.replies["/some.pth"] = Reply()
        assert "expected #sha256=" in refused(f"{server.url}/some.pth#{fragment}", cache)
        assert server.seen == []

    def test_two_urls_of_one_name_are_two_files(self, server, cache):
        server.replies["/a/model.pth"] = Reply(b"a")
        server.replies["/b/model.pth"] = Reply(b"b")
        assert [fetch(f"{server.url}/{x}/model.pth").path.read_bytes() for x in "ab"] == [b"a", b"b"]

    @pytest.mark.parametrize("path", ["/", "/..%2F..%2Fevil", "/a%00b", "/" + "x" * 400 + ".pth", "/ä.pth"])
    def test_an_odd_name_stays_within_the_cache(self, server, cache, path):
        from urllib.parse import quote

        server.replies[quote(path, safe="/%")] = Reply(b"a")
        fetched = fetch(server.url + path)
        assert fetched.path.parent == cache
        assert re.fullmatch(r"[\w.-]{1,140}", fetched.path.name, re.ASCII)
        assert fetched.path.read_bytes() == b"a"

    def test_redirections_are_followed(self, server):
        server.replies["/old.pth"] = Reply(b"", 302, {"Location": "/new.pth"})
        server.replies["/new.pth"] = Reply()
        assert fetch(f"{server.url}/old.pth").path.read_bytes() == CONTENT

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 429, 500, 502, 503])
    def test_a_servers_refusal_is_said_with_its_number(self, server, cache, status):
        server.replies["/some.pth"] = Reply(b"<html>sorry</html>", status, {"Content-Type": "text/html"})
        assert f"the server answered {status} " in refused(f"{server.url}/some.pth", cache)

    def test_a_loop_of_redirections_ends(self, server, cache):
        server.replies["/some.pth"] = Reply(b"", 302, {"Location": "/some.pth"})
        assert "redirects" in refused(f"{server.url}/some.pth", cache)

    def test_a_web_page_instead_of_a_file_is_refused(self, server, cache):
        server.replies["/some.pth"] = Reply(b"<html>log in</html>", 200, {"Content-Type": "text/html; charset=utf-8"})
        assert "a web page, not a file of weights" in refused(f"{server.url}/some.pth", cache)

    def test_an_empty_file_is_refused(self, server, cache):
        server.replies["/some.pth"] = Reply(b"")
        assert "the server sent an empty file" in refused(f"{server.url}/some.pth", cache)

    def test_a_compressed_body_is_neither_asked_for_nor_taken(self, server, cache):
        server.replies["/some.pth"] = Reply(headers={"Content-Encoding": "gzip"})
        assert "compressed body" in refused(f"{server.url}/some.pth", cache)
        assert server.seen[0][2]["Accept-Encoding"] == "identity"

    def test_a_server_that_is_not_there_is_said(self, cache):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        assert "127.0.0.1 refuses the connection" in refused(f"http://127.0.0.1:{port}/some.pth", cache)

    def test_a_server_that_hangs_up_without_an_answer_is_not_asked_again(self, server, cache):
        server.down = True
        assert "the connection to 127.0.0.1 broke" in refused(f"{server.url}/some.pth", cache)
        assert len(server.seen) == 1

    def test_a_host_that_cannot_be_found_is_said(self, cache):
        message = refused("http://no-such-host.invalid/some.pth", cache)
        assert "no-such-host.invalid cannot be found; is this machine offline?" in message

    @pytest.mark.parametrize("url", ["http://", "http://[", "https://:80/x", "http://127.0.0.1:99999/x"])
    def test_an_address_that_is_none_is_refused(self, cache, url):
        refused(url, cache)

    def test_a_password_and_a_token_do_not_get_into_messages(self, server, cache):
        host = server.url.removeprefix("http://")
        for path in ("/missing.pth", "/some.pth"):
            server.replies["/some.pth"] = Reply()
            url = f"http://user:secret1@{host}{path}?token=secret2"
            try:
                said = str(fetch(url))
            except DownloadError as error:
                said = str(error)
            assert path.strip("/") in said
            assert "secret" not in said

    def test_progress_is_a_bar_on_standard_error_when_asked_for_and_nothing_otherwise(self, server, capfd):
        server.replies["/some.pth"] = server.replies["/other.pth"] = Reply()
        fetch(f"{server.url}/some.pth", progress=False)
        fetch(f"{server.url}/some.pth")
        assert capfd.readouterr() == ("", "")
        fetch(f"{server.url}/other.pth", progress=True)
        out, err = capfd.readouterr()
        assert out == ""
        assert "other.pth" in err
        assert "3.15M" in err


class TestBrokenOff:
    def test_it_goes_on_where_it_broke_off(self, server, cache):
        server.replies["/some.pth"] = Reply(cuts=[1_000_000, 1_500_000, 7])
        assert fetch(f"{server.url}/some.pth#sha256={SHA256}").path.read_bytes() == CONTENT
        starts = server.ranges("/some.pth")
        assert starts[0] is None
        places = [int(start.removeprefix("bytes=").rstrip("-")) for start in starts[1:]]
        assert len(places) == 3
        assert 0 < places[0] <= 1_000_000 < places[1] == places[2] <= 2_500_000
        assert len(files(cache)) == 1

    @pytest.mark.parametrize(
        ("reply", "asked"),
        [
            (Reply(headers={}, cuts=[1_000_000]), False),
            (Reply(headers={"ETag": 'W/"weak"'}, cuts=[1_000_000]), False),
            (Reply(ranges=False, cuts=[1_000_000]), True),
        ],
        ids=["no validator", "weak validator", "no ranges"],
    )
    def test_it_starts_anew_where_the_rest_might_be_of_another_file(self, server, reply, asked):
        server.replies["/some.pth"] = reply
        assert fetch(f"{server.url}/some.pth").path.read_bytes() == CONTENT
        assert [start is not None for start in server.ranges("/some.pth")] == [False, asked]

    def test_a_file_that_changed_in_between_is_fetched_from_its_beginning(self, server):
        other = CONTENT[::-1]
        replies = iter([Reply(cuts=[1_000_000]), Reply(other, headers={"ETag": '"two"'})])
        server.replies["/some.pth"] = lambda: next(replies)
        assert fetch(f"{server.url}/some.pth").path.read_bytes() == other

    def test_a_part_that_was_not_asked_for_is_refused(self, server, cache):
        wrong = Reply(status=206, headers={"Content-Range": "bytes 5-9/10"}, body=b"12345")
        server.replies["/some.pth"] = wrong
        assert "another part than was asked for" in refused(f"{server.url}/some.pth", cache)

    def test_one_that_always_breaks_off_is_given_up(self, server, cache):
        server.replies["/some.pth"] = Reply(cuts=[300_000] * 50)
        message = refused(f"{server.url}/some.pth", cache)
        assert re.search(rf"broken off after \d+ of {len(CONTENT)} bytes; nothing was kept", message)
        assert len(server.seen) == downloads._ATTEMPTS

    def test_one_that_gets_nowhere_twice_is_given_up(self, server, cache):
        server.replies["/some.pth"] = Reply(cuts=[0] * 50)
        refused(f"{server.url}/some.pth", cache)
        assert len(server.seen) == 2

    def test_one_that_stalls_is_given_up(self, server, cache, monkeypatch):
        monkeypatch.setattr(downloads, "_TIMEOUT", (1, 0.3))
        server.replies["/some.pth"] = Reply(cuts=[0] * 50, hang=True)
        assert "127.0.0.1" in refused(f"{server.url}/some.pth", cache)
        server.replies["/some.pth"] = Reply(cuts=[2_000_000] + [0] * 50, hang=True)
        assert "broken off after" in refused(f"{server.url}/some.pth", cache)

    def test_a_slow_server_is_waited_for(self, server, monkeypatch):
        monkeypatch.setattr(downloads, "_TIMEOUT", (1, 0.5))
        server.replies["/some.pth"] = Reply(pause=0.03)
        assert fetch(f"{server.url}/some.pth").path.read_bytes() == CONTENT

    def test_without_a_length_only_a_checksum_tells_a_break_from_the_end(self, server, cache):
        server.replies["/some.pth"] = Reply(length=False, cuts=[1_000_000], headers={})
        message = refused(f"{server.url}/some.pth#sha256={SHA256}", cache)
        assert "damaged on the way" in message

    # The second fails at a chunk that fits a buffer, which closing the file tries to write once more.
    @pytest.mark.parametrize(("size", "room"), [(len(CONTENT), 1_500_000), ((1 << 16) + 5000, (1 << 16) + 1000)])
    def test_a_full_disk_is_said_and_freed(self, server, cache, size, room):
        # In a process of its own: the limit on the size of files holds for all of it.
        server.replies["/some.pth"] = Reply(CONTENT[:size])
        script = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
from common.sources.downloads import fetch
from common.errors import DownloadError
try:
    fetch(sys.argv[1])
except DownloadError as error:
    print(error)
"""
        command = [sys.executable, "-c", script, f"{server.url}/some.pth", str(room)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.stderr == ""
        assert re.fullmatch(r".*some\.pth: cannot be written: File too large; nothing was kept\n", run.stdout)
        assert files(cache) == []

    def test_a_cache_that_cannot_be_made_is_said(self, server, cache):
        cache.parent.joinpath("cache").write_text("a file")
        server.replies["/some.pth"] = Reply()
        with pytest.raises(DownloadError, match=r"cannot be written: (Not a directory|File exists)"):
            fetch(f"{server.url}/some.pth")

    def test_ctrl_c_leaves_nothing(self, server, cache, monkeypatch):
        server.replies["/some.pth"] = Reply()
        monkeypatch.setattr(downloads, "mismatch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{server.url}/some.pth")
        assert files(cache) == []


def _fetch_in_process(url, start, results):
    start.wait()
    results.put(hashlib.sha256(fetch(url).path.read_bytes()).hexdigest())


class TestProcesses:
    @pytest.mark.slow
    def test_many_at_once_download_one_file_once(self, server, cache):
        server.replies["/some.pth"] = Reply(pause=0.01)
        context = multiprocessing.get_context("spawn")
        start, results = context.Event(), context.Queue()
        processes = [
            context.Process(target=_fetch_in_process, args=(f"{server.url}/some.pth", start, results)) for _ in range(4)
        ]
        for process in processes:
            process.start()
        start.set()
        assert [results.get(timeout=60) for _ in processes] == [SHA256] * 4
        for process in processes:
            process.join()
        assert len(server.seen) == 1
        assert len(files(cache)) == 1

    def test_many_threads_at_once_too(self, server, cache):
        server.replies["/some.pth"] = Reply(pause=0.01)
        found = []
        threads = [threading.Thread(target=lambda: found.append(fetch(f"{server.url}/some.pth"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [fetched.path.read_bytes() == CONTENT for fetched in found] == [True] * 4
        assert len(files(cache)) == 1

    def test_those_that_wait_for_one_that_fails_try_themselves(self, server, cache):
        replies = iter([Reply(b"", 500), Reply(), Reply()])
        server.replies["/some.pth"] = lambda: next(replies)
        context = multiprocessing.get_context("spawn")
        start, results = context.Event(), context.Queue()
        processes = [
            context.Process(target=_outcome_in_process, args=(f"{server.url}/some.pth", start, results))
            for _ in range(3)
        ]
        for process in processes:
            process.start()
        start.set()
        assert sorted(results.get(timeout=60) for _ in processes) == ["answered 500", "whole", "whole"]
        for process in processes:
            process.join()
        assert len(server.seen) == 2
        assert len(files(cache)) == 1

    def test_what_a_killed_process_leaves_is_never_used_and_goes_with_the_next_download(self, server, cache):
        url = f"{server.url}/some.pth"
        server.replies["/some.pth"] = Reply(cuts=[2_000_000], hang=True)
        script = "import sys; from common.sources.downloads import fetch; fetch(sys.argv[1])"
        process = subprocess.Popen([sys.executable, "-c", script, url])
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in cache.glob(".*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.released.set()
        (left,) = files(cache)
        assert left.endswith(".part")
        server.replies["/some.pth"] = Reply(CONTENT[::-1], headers={"ETag": '"two"'})
        assert fetch(url).path.read_bytes() == CONTENT[::-1]
        assert server.ranges("/some.pth") == [None, None]
        assert len(files(cache)) == 1
        assert not files(cache)[0].endswith(".part")


def _outcome_in_process(url, start, results):
    start.wait()
    try:
        results.put("whole" if fetch(url).path.read_bytes() == CONTENT else "damaged")
    except DownloadError as error:
        results.put("answered 500" if "answered 500" in str(error) else str(error))


class TestPath:
    def test_a_file_and_a_folder_are_themselves(self, tmp_path):
        file = tmp_path / "weights.pth"
        file.write_bytes(b"a")
        for path in (file, str(file), tmp_path, str(tmp_path)):
            assert fetch(path) == downloads.Fetched(path=Path(path))

    def test_a_file_may_be_named_as_a_reference_is(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("torchvision:x").write_bytes(b"a")
        assert fetch("torchvision:x").path == Path("torchvision:x")

    @pytest.mark.parametrize("reference", ["none.pth", "", "ftp://host/x.pth", "file:///etc/passwd", "tensorhub:a"])
    def test_what_is_neither_a_file_nor_a_reference_is_answered_with_what_is_expected(self, cache, reference):
        assert "there is no such file; expected a file, a URL, torchvision:" in refused(reference, cache)

    def test_a_path_that_is_not_there_is_said(self, cache, tmp_path):
        assert refused(tmp_path / "none.pth", cache).endswith("none.pth': there is no such file")


class TestTable:
    def test_every_entry_is_a_network_here_and_can_be_prepared_for(self):
        from common.images import PRESETS

        assert len(table()) > 50
        for known in table():
            assert known.spec.in_channels == 3
            assert known.preprocessing in PRESETS
            assert known_weights.find(known.reference) is known

    def test_what_comes_over_plain_urls_has_a_checksum_and_https(self):
        for known in table():
            if not known.reference.startswith("hf://"):
                assert known.url.startswith("https://")
                assert re.fullmatch("sha256:[0-9a-f]{8}|md5:[0-9a-f]{32}", known.checksum)

    def test_references_urls_and_checksums_are_each_given_once(self):
        for name in ("reference", "url", "checksum"):
            values = [getattr(known, name) for known in table() if getattr(known, name)]
            assert len(set(values)) == len(values) > 20

    def test_accuracies_are_percentages_and_of_the_right_order(self):
        published = [known for known in table() if known.top1 is not None]
        assert len(published) >= 37
        for known in published:
            assert 55 < known.top1 < known.top5 < 98

    def test_keras_without_its_top_has_no_head(self):
        heads = {known.reference: known.spec.head for known in table() if known.reference.startswith("keras:resnet50:")}
        assert heads == {"keras:resnet50:imagenet": "softmax", "keras:resnet50:imagenet:notop": "none"}

    def test_the_table_agrees_with_keras_own(self):
        keras = find_spec("keras")  # its source will do: importing it takes seconds
        if keras is None:
            pytest.skip("keras is not installed")
        folder = Path(keras.origin).parent / "src" / "applications"
        modules = ("resnet", "vgg16", "vgg19", "densenet", "efficientnet", "inception_v3")
        text = "".join((folder / f"{module}.py").read_text() for module in modules)
        for known in table():
            if known.reference.startswith("keras:"):
                assert known.checksum.removeprefix("md5:") in text


COMMIT = "0123456789abcdef" * 2 + "01234567"


class TestHub:
    """Against the few addresses of the hub that its client asks for."""

    @pytest.fixture(autouse=True)
    def hub(self, server, monkeypatch, tmp_path):
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        return tmp_path / "hub"

    @staticmethod
    def put(server, name, body, revision="main", **options):
        digest = hashlib.sha256(body).hexdigest()
        for at in (revision, COMMIT):
            server.replies[f"/owner/repo/resolve/{at}/{name}"] = Reply(
                body, headers={"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, **options
            )

    @staticmethod
    def absent(server, *names):
        for name in names:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            server.replies[f"/owner/repo/resolve/main/{name}"] = Reply(b"", 404, headers)

    def test_safetensors_come_first(self, server):
        self.put(server, "model.safetensors", CONTENT)
        self.put(server, "pytorch_model.bin", b"other")
        fetched = fetch("hf://owner/repo")
        assert fetched.path.name == "model.safetensors"
        assert fetched.path.read_bytes() == CONTENT

    def test_then_an_index_with_all_that_it_lists(self, server):
        self.absent(server, "model.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        self.put(server, "model.safetensors.index.json", json.dumps(index).encode())
        for number in (1, 2):
            self.put(server, f"model-0000{number}-of-00002.safetensors", CONTENT + bytes([number]))
        fetched = fetch("hf://owner/repo")
        assert fetched.path.name == "model.safetensors.index.json"
        shards = sorted(path.name for path in fetched.path.parent.glob("*.safetensors"))
        assert shards == sorted(set(index["weight_map"].values()))

    def test_the_files_that_an_index_lists_load_as_one_checkpoint(self, server, tmp_path):
        spec = ResNetSpec(block="basic", blocks=(1, 1), widths=(4, 8), stem_width=4, classes=3)
        made = weights.init(spec)
        save_weights(tmp_path / "whole.safetensors", spec, made, to="torchvision")
        whole = load_file(tmp_path / "whole.safetensors")
        shards = [dict(list(whole.items())[half::2]) for half in (0, 1)]
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        index = {"weight_map": {name: files[half] for half in (0, 1) for name in shards[half]}}
        self.absent(server, "model.safetensors")
        self.put(server, "model.safetensors.index.json", json.dumps(index).encode())
        for file, shard in zip(files, shards, strict=True):
            self.put(server, file, save(shard))
        loaded = checkpoints.read(fetch("hf://owner/repo").path)
        assert loaded.spec == spec
        assert all(np.array_equal(loaded.weights[name], made[name]) for name in weights.shapes(spec))

    def test_then_a_pytorch_file(self, server):
        self.absent(server, "model.safetensors", "model.safetensors.index.json")
        self.put(server, "pytorch_model.bin", CONTENT)
        assert fetch("hf://owner/repo").path.read_bytes() == CONTENT

    def test_an_index_in_a_folder_lists_files_of_that_folder(self, server):
        self.put(
            server, "sub/model.safetensors.index.json", json.dumps({"weight_map": {"a": "one.safetensors"}}).encode()
        )
        self.put(server, "sub/one.safetensors", CONTENT)
        fetched = fetch("hf://owner/repo/sub/model.safetensors.index.json")
        assert (fetched.path.parent / "one.safetensors").read_bytes() == CONTENT

    def test_a_file_and_a_revision_may_be_named(self, server):
        self.put(server, "sub/other.bin", CONTENT, revision="v1")
        fetched = fetch("hf://owner/repo@v1/sub/other.bin")
        assert fetched.path.read_bytes() == CONTENT

    def test_known_repositories_bring_what_is_known_of_them(self, server, monkeypatch):
        self.put(server, "model.safetensors", CONTENT)
        entry = KnownWeights(reference="hf://owner/repo", variant="resnet18", preprocessing="timm")
        monkeypatch.setattr(known_weights, "table", lambda: (entry,))
        assert fetch("hf://owner/repo").known == entry
        # Another revision need not be what the table describes.
        assert fetch(f"hf://owner/repo@{COMMIT}").known is None

    def test_what_is_in_the_cache_is_used_offline(self, server):
        self.absent(server, "model.safetensors", "model.safetensors.index.json")
        self.put(server, "pytorch_model.bin", CONTENT)
        online = fetch("hf://owner/repo")
        server.stop()
        start = time.monotonic()
        assert fetch("hf://owner/repo").path == online.path
        assert time.monotonic() - start < 10

    def test_what_is_not_is_said(self, server, cache, hub, capfd):
        server.stop()
        message = refused("hf://owner/repo", hub)
        assert message.endswith("not in the cache, and the hub does not answer; is this machine offline?")
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("status", "headers", "expected"),
        [
            (404, {"X-Error-Code": "EntryNotFound"}, "there is no model.safetensors or "),
            (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision"),
            (401, {"X-Error-Code": "RepoNotFound"}, "no such repository, or a private one"),
            (403, {"X-Error-Code": "GatedRepo"}, "its owner asks for a login"),
            (500, {}, "the hub does not answer"),
        ],
    )
    def test_the_hubs_refusals_are_said(self, server, hub, status, headers, expected):
        names = hub_module.FILES
        for name in names:
            server.replies[f"/owner/repo/resolve/main/{name}"] = Reply(b"", status, headers)
        assert expected in refused("hf://owner/repo", hub)

    def test_damage_on_the_way_is_refused_and_the_cache_holds_nothing_of_it(self, server, hub):
        self.put(server, "model.safetensors", CONTENT)
        for reply in server.replies.values():
            reply.body = CONTENT[:-1] + b"!"
        with pytest.raises(DownloadError, match=r"damaged on the way.*nothing was kept"):
            fetch("hf://owner/repo")
        assert "model.safetensors" not in [path.name for path in hub.rglob("*")]
        assert not [path for path in hub.rglob("*") if path.is_file() and path.stat().st_size > 1000]

    def test_damage_in_the_cache_is_repaired(self, server, hub):
        self.put(server, "model.safetensors", CONTENT)
        path = fetch("hf://owner/repo").path
        path.resolve().write_bytes(CONTENT[:-1] + b"!")
        assert fetch("hf://owner/repo").path.read_bytes() == CONTENT

    def test_broken_off_half_way_it_goes_on_without_a_word(self, server, monkeypatch):
        said = []
        monkeypatch.setattr(logging.Logger, "handle", lambda self, record: said.append(record))
        self.put(server, "model.safetensors", CONTENT, cuts=[1_000_000])
        assert fetch("hf://owner/repo").path.read_bytes() == CONTENT
        assert [record.getMessage() for record in said if record.name.startswith("huggingface_hub")] == []

    @pytest.mark.parametrize(
        "index",
        [
            b"",
            b"[]",
            b"{}",
            b'{"weight_map": []}',
            b'{"weight_map": {}}',
            b'{"weight_map": {"a": 1}}',
            b'{"weight_map": {"a": "../../evil"}}',
            b'{"weight_map": {"a": "/etc/passwd"}}',
            b'{"weight_map": {"a": ".hidden"}}',
            b"[" * 100_000,
            b"\xff\xfe",
        ],
    )
    def test_an_index_that_is_none_is_refused(self, server, index):
        self.put(server, "model.safetensors.index.json", index)
        with pytest.raises(DownloadError, match="is no index of weights") as caught:
            fetch("hf://owner/repo/model.safetensors.index.json")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "reference", ["hf://", "hf://owner", "hf://owner/", "hf:///repo", "hf://a/b@/c", "hf://a b/c"]
    )
    def test_a_reference_that_is_none_is_refused(self, hub, reference):
        assert "expected hf://owner/repo" in refused(reference, hub)


class TestMissing:
    @pytest.mark.parametrize(
        ("missing", "reference"), [("requests", "http://127.0.0.1:1/x"), ("huggingface_hub", "hf://a/b")]
    )
    def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it(self, monkeypatch, missing, reference):
        from common.errors import BackendMissing

        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(BackendMissing, match=r"pip install 'resnet-parity\[checkpoints\]'"):
            fetch(reference)

    def test_a_path_needs_none_of_them(self, tmp_path):
        script = (
            "import sys; from common.sources.downloads import fetch; fetch(sys.argv[1]);"
            "print({'requests', 'huggingface_hub', 'tqdm'} & set(sys.modules))"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, env=os.environ
        )
        assert run.stdout == "set()\n"
