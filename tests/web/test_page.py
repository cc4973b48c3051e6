"""The page: what its API tells, its files and what they refer to, who may ask for it, and that it can be off."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import aiohttp
import numpy as np
import pytest

from models.spec import LENGTHS, Golden, GoldenArray
from service.web.describe import EXAMPLES
from service.web.page import STATIC
from tests.onnx_models import build
from tests.rpc import predict
from tests.serving import serving
from tests.web.calls import browsing

POLICY = {
    "default-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "object-src": "'none'",
}


PROBES = {"/metrics", "/livez", "/readyz"}
MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function|document\.write"
"""What could make code of a text."""


async def json_of(served, path):
    async with browsing(served) as session, session.get(path) as response:
        return response.status, await response.json()


# What the API tells


async def test_every_served_version_is_listed(served):
    _, content = await json_of(served, "/api/models")
    lanes = served.server.engine.lanes
    assert [(each["name"], each["version"]) for each in content["models"]] == [
        (lane.name, lane.version) for lane in lanes
    ]
    for each, lane in zip(content["models"], lanes, strict=True):
        assert each["digest"] == lane.backend.digest
        assert each["exactness"] == {"verdict": lane.exactness.verdict, "detail": lane.exactness.detail}
        assert (each["step_mode"], each["step_mode_reason"]) == (lane.step_mode.value, lane.step_mode_reason)
    by_name = {each["name"]: each for each in content["models"]}
    assert by_name["bilstm"]["step_mode"] == "buffered"
    assert by_name["coupled"]["exactness"]["verdict"] == "coupled"
    assert content["broken"] == []


async def test_a_version_is_told_with_its_whole_spec(served):
    _, content = await json_of(served, "/api/models/gru/versions/2")
    assert content["spec"] == served.server.engine.lane("gru", 2).backend.spec.model_dump(
        mode="json", exclude={"golden"}
    )
    assert content["version"] == 2


async def test_a_model_that_is_not_served_is_not_found(served):
    status, content = await json_of(served, "/api/models/nothing/versions/1")
    assert status == 404
    assert content["error"]["code"] == "NOT_FOUND"
    assert "no model 'nothing' is served" in content["error"]["message"]
    status, content = await json_of(served, "/api/models/gru/versions/9")
    assert (status, content["error"]["message"]) == (404, "model 'gru' has no version 9; served: 1, 2")


async def test_numbers_are_the_engines(served):
    with served.stub() as stub:
        predict(stub, "rnn", [np.zeros((5, 3), np.float32), np.zeros((2, 3), np.float32)])
    _, content = await json_of(served, "/api/stats")
    [numbers] = [each for each in content["models"] if each["name"] == "rnn"]
    tally = served.lane("rnn").tally
    assert numbers["steps"] == tally.steps >= 7
    assert (numbers["runs"], numbers["run_rows"], numbers["sequences"]) == (
        tally.runs,
        tally.run_rows_sum,
        tally.sequences,
    )
    assert (content["workers"], content["is_draining"]) == (1, False)


async def test_what_is_broken_is_told(repository, tmp_path):
    build("gru").save(tmp_path, "good")
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "1" / "model.onnx").write_bytes(b"no model")
    with serving(tmp_path) as served:
        _, content = await json_of(served, "/api/models")
        _, stats = await json_of(served, "/api/stats")
    assert stats["broken"] == 1
    [broken] = content["broken"]
    assert (broken["name"], broken["version"]) == ("bad", 1)
    assert str(tmp_path / "bad") in broken["error"]


# Examples


async def test_an_example_is_the_longest_golden_sequence_without_its_padding(tmp_path):
    model = build("gru")
    x = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    inputs = {"x": x, LENGTHS: np.array([2, 3], np.int32), "state.0.h": np.ones((2, 1, 8), np.float32)}
    golden = Golden(inputs={name: GoldenArray.of(value) for name, value in inputs.items()}, outputs={})
    resaved(model, golden=(golden,)).save(tmp_path, "gru")
    with serving(tmp_path) as served:
        _, content = await json_of(served, "/api/models/gru/versions/1")
    [example] = content["examples"]
    assert list(example["inputs"]) == ["x"]
    np.testing.assert_array_equal(GoldenArray(**example["inputs"]["x"]).array(), x[1, :3])


@pytest.mark.parametrize("features", [12, 3])
async def test_a_task_that_ships_has_real_examples_where_the_model_takes_them(tmp_path, features):
    model = build("gru", features=features)
    training = model.spec.training.model_copy(update={"task": "vowels"})
    resaved(model, training=training).save(tmp_path, "gru")
    with serving(tmp_path) as served:
        _, content = await json_of(served, "/api/models/gru/versions/1")
    names = [example["name"] for example in content["examples"]]
    numbered = ["Test sequence 0, speaker 1", "Test sequence 198, speaker 5", "Test sequence 341, speaker 9"]
    assert names == (numbered if features == 12 else [])


@pytest.mark.parametrize("task", ["../../static/index", "", "a/b", "/etc/passwd"])
async def test_a_tasks_name_leads_to_no_other_file(tmp_path, task):
    model = build("gru")
    resaved(model, training=model.spec.training.model_copy(update={"task": task})).save(tmp_path, "gru")
    with serving(tmp_path) as served:
        status, content = await json_of(served, "/api/models/gru/versions/1")
    assert (status, content["examples"]) == (200, [])


def resaved(model, **changes):
    """The same model with another spec in its file."""
    import onnx

    from models.spec import METADATA_KEY

    spec = model.spec.model_copy(update=changes)
    file = onnx.load_from_string(model.content)
    onnx.helper.set_model_props(file, {METADATA_KEY: spec.to_json()})
    return type(model)(file.SerializeToString(), spec, model.weights)


# Files


class References(HTMLParser):
    """What a page refers to, and what its policy would keep from working."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self._is_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src", "action", "poster", "data", "srcset") and value is not None:
                self.found.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
        self._is_script = tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._is_script and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False


def references(name: str, text: str) -> list[str]:
    """Addresses that a file of the page refers to, as a browser resolves them."""
    base = "/" if name == "index.html" else f"/static/{name}"
    if name.endswith(".html"):
        parser = References()
        parser.feed(text)
        found = [each for each in parser.found if not each.startswith("#")]
    elif name.endswith(".css"):
        found = re.findall(r"""(?:url\(|@import\s+)["']?([^"')\s]+)""", text)
    else:
        found = re.findall(r"""(?:from|import)\s*\(?\s*["']([^"']+)["']""", text)
        found += [f"/{each}" for each in re.findall(r"""(?:get|call|fetch)\(\s*["'`](api/[a-z]+)["'`]""", text)]
    return [urljoin(base, each) for each in found]


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
async def test_every_reference_resolves_and_none_leads_elsewhere(served, path):
    text = path.read_text(encoding="utf-8")
    outside = [url for url in re.findall(r"(?:https?:)?//[\w.-]+", text) if "." in url and "www.w3.org" not in url]
    assert not outside
    async with browsing(served) as session:
        for reference in references(path.name, text):
            assert not urlsplit(reference).netloc
            async with session.get(reference) as response:
                is_socket = reference in ("/api/stream", "/api/generate")
                assert response.status == (400 if is_socket else 200), reference


def test_the_page_has_no_inline_code():
    parser = References()
    parser.feed((STATIC / "index.html").read_text(encoding="utf-8"))
    assert len(parser.found) >= 4
    assert not parser.inline
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function|document\.write", text), (
            path
        )


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/api/models", "/api/stats", "/api/models/lstm/versions/1"])
async def test_headers_keep_a_browser_from_strangers(served, path):
    async with browsing(served) as session, session.get(path) as response:
        headers = response.headers
    assert response.status == 200
    policy = dict(each.split(maxsplit=1) for each in headers["Content-Security-Policy"].split("; "))
    assert policy == POLICY
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == ("no-store" if path.startswith("/api") else "no-cache")


async def test_files_are_zipped_and_asked_for_again_only_when_they_change(served):
    content = (STATIC / "style.css").read_bytes()
    async with browsing(served) as session:
        async with session.get("/static/style.css") as response:
            assert await response.read() == content
            assert response.headers["Content-Encoding"] == "gzip"
            assert response.content_type == "text/css"
            etag = response.headers["ETag"]
        async with session.get("/static/style.css", headers={"If-None-Match": etag}) as response:
            assert (response.status, await response.read()) == (304, b"")
        async with session.get("/static/style.css", headers={"If-None-Match": '"other"'}) as response:
            assert response.status == 200
        async with session.get("/static/style.css", headers={"Accept-Encoding": "identity"}) as response:
            assert "Content-Encoding" not in response.headers
            assert await response.read() == content


@pytest.mark.parametrize("name", ["nothing.js", "..%2fapp.py", "%2e%2e/app.py", "README.md"])
async def test_no_other_file_is_served(served, name):
    async with browsing(served) as session, session.get(f"/static/{name}") as response:
        assert response.status == 404


def test_examples_say_where_they_are_from():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.json"):
        assert f"`{path.stem}`" in readme


# Who may ask


def origin(served, host="127.0.0.1"):
    return f"http://{host}:{served.server.http_port}"


@pytest.mark.parametrize("path", ["/", "/api/models", "/api/stats", "/api/stream", "/api/generate"])
@pytest.mark.parametrize(
    "stranger", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost.evil.example"]
)
async def test_a_page_of_another_origin_is_refused(served, path, stranger):
    async with browsing(served) as session, session.get(path, headers={"Origin": stranger}) as response:
        assert response.status == 403
        assert "may not use this server" in (await response.json())["error"]["message"]


async def test_a_foreign_page_cannot_open_a_socket(served):
    async with browsing(served) as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await session.ws_connect("/api/stream", origin="http://evil.example")
        assert caught.value.status == 403
        async with session.ws_connect("/api/stream", origin=origin(served)):
            pass


async def test_a_foreign_page_cannot_ask_without_an_origin(served):
    async with browsing(served) as session:
        for site, mode, status in (
            ("cross-site", "no-cors", 403),
            ("same-site", "cors", 403),
            ("same-origin", "cors", 200),
            ("none", "navigate", 200),
            ("cross-site", "navigate", 200),
        ):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
            async with session.get("/api/models", headers=headers) as response:
                assert response.status == status, site


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8002", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost", 200),
        ("gpu-7:8002", 200),
        ("[::1]:8002", 200),
        ("10.1.2.3:8002", 200),
        ("models.test", 200),
        ("MODELS.test:443", 200),
        ("", 403),
        ("[", 403),
    ],
)
async def test_only_its_own_names_are_answered_to(named, host, status):
    """A stranger's name that is made to point here is none of them, though Host and Origin agree."""
    async with browsing(named) as session:
        headers = {"Host": host, "Origin": f"http://{host}"} if host else {"Host": host}
        async with session.get("/api/models", headers=headers) as response:
            assert response.status == status


async def test_a_named_proxy_may_have_another_host(named):
    headers = {"Host": "127.0.0.1:9", "Origin": "https://models.test"}
    async with browsing(named) as session, session.get("/api/models", headers=headers) as response:
        assert response.status == 200


@pytest.fixture(scope="module")
def named(repository):
    with serving(repository, page_hosts="other.test,models.test") as running:
        yield running


# Off


async def test_without_the_page_only_metrics_and_probes_answer(repository):
    with serving(repository, page="false") as served:
        async with browsing(served) as session:
            statuses = {}
            for path in (
                "/",
                "/static/main.js",
                "/api/models",
                "/api/stats",
                "/api/stream",
                "/metrics",
                "/livez",
                "/readyz",
            ):
                async with session.get(path) as response:
                    statuses[path] = response.status
    assert {path for path, status in statuses.items() if status == 200} == PROBES
    assert set(statuses.values()) == {200, 404}
