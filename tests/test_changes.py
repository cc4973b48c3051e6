"""service.changes: its laws, on any repository, policy and past."""

from hypothesis import given
from hypothesis import strategies as st

from service.changes import Settling, changes, wanted
from service.versions import VersionPolicies, VersionPolicy

KEYS = st.tuples(st.sampled_from("ab"), st.integers(1, 5))
PRINTS = st.dictionaries(KEYS, st.sampled_from(["old", "new"]), max_size=10)
POLICY = st.one_of(
    st.just(VersionPolicy()),
    st.integers(1, 3).map(lambda num: VersionPolicy(num_latest=num)),
    st.sets(st.integers(1, 5), min_size=1).map(lambda named: VersionPolicy(named=tuple(sorted(named)))),
)
POLICIES = st.builds(VersionPolicies, POLICY, st.dictionaries(st.just("a"), POLICY))


@given(PRINTS, PRINTS, PRINTS, POLICIES, st.sets(st.sampled_from("ab")), st.data())
def test_following_ends_with_what_is_wanted(found, served, broken, policies, unloaded, data):
    """Loads as they may go, one after another, until there is nothing more to load; then what is to be retired."""
    served, broken = dict(served), dict(broken)
    for _ in range(len(found) + 1):
        todo = changes(found, served, broken, policies, unloaded)
        if not todo.load:
            break
        for key in todo.load:
            assert key[0] not in unloaded
            assert found[key] not in (served.get(key), broken.get(key)), "loaded again though nothing has changed"
            if data.draw(st.booleans()):
                served[key] = found[key]
            else:
                broken[key] = found[key]
    else:
        raise AssertionError("it does not come to an end")
    before = dict(served)
    for key in todo.retire:
        del served[key]
    assert changes(found, served, broken, policies, unloaded) == type(todo)([], [])
    for model in "ab":
        able = {
            v
            for name, v in found
            if name == model and ((model, v) in before or broken.get((model, v)) != found[model, v])
        }
        assert [v for name, v in sorted(served) if name == model] == (
            [] if model in unloaded else policies.of(model).pick(able)
        )
    for key, fingerprint in served.items():
        assert fingerprint == found[key] or broken[key] == found[key], (
            "what was replaced is served, and nothing is wrong"
        )


@given(PRINTS, PRINTS, PRINTS, POLICIES)
def test_nothing_is_retired_that_is_wanted(found, served, broken, policies):
    todo = changes(found, served, broken, policies)
    assert not set(todo.retire) & wanted(found, served, broken, policies)
    assert set(todo.retire) <= served.keys()


@given(PRINTS, st.lists(PRINTS, max_size=8))
def test_only_what_was_seen_twice_is_believed(first, looks):
    settling = Settling(first)
    before, last = dict(first), first
    for found in looks:
        believed = dict(settling.look(found))
        for key in found.keys() | last.keys() | before.keys():
            agree = found.get(key) == last.get(key)
            assert believed.get(key) == (found.get(key) if agree else before.get(key))
        before, last = believed, found


def test_example():
    found = {("m", 1): "a", ("m", 2): "b", ("m", 3): "c", ("n", 4): "d"}
    policies = VersionPolicies.parse("latest:1 n=all")
    served = {("m", 2): "b", ("n", 3): "x"}
    todo = changes(found, served, {}, policies)
    assert (todo.load, todo.retire) == ([("m", 3), ("n", 4)], [("m", 2), ("n", 3)])
    todo = changes(found, served, {("m", 3): "c"}, policies)  # the newest is broken: the one before goes on
    assert (todo.load, todo.retire) == ([("n", 4)], [("n", 3)])
    todo = changes({**found, ("m", 3): "mended"}, served, {("m", 3): "c"}, policies, {"n"})
    assert (todo.load, todo.retire) == ([("m", 3)], [("m", 2), ("n", 3)])
