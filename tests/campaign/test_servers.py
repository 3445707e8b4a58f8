"""Downloads from hostile servers, and each kind of answer by itself."""

import pytest

from tests.campaign import servers


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        (["drips the head"], "refused"),
        (["drips the body"], "refused"),
        (["slow circle"], "refused"),
        (["a byte"], "refused"),
        (["odd status"], "refused"),
        (["a page"], "refused"),
        (["a page as bytes"], "refused"),
        (["redirects, dripping"], "fetched"),
        (["redirects, flooding"], "fetched"),
        (["cut", "busy", "good"], "fetched"),
    ],
)
def test_each_of_these_servers_by_itself(tmp_path, answers, outcome):
    with servers.serving() as server:
        assert servers.trial(server, tmp_path, 0, answers, "seed") == outcome


@pytest.mark.campaign
def test_a_download_ends_with_the_right_file_or_a_sentence(tmp_path):
    done = servers.run(tmp_path, trials=20, seed=0)
    assert [trial for trial in done if trial.came not in ("fetched", "refused")] == []
    assert {trial.came for trial in done} == {"fetched", "refused"}
