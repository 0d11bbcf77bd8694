"""The template: what a check-in shows, the order of the parts, and that what is written can be read back."""
import itertools

import pytest

from ga_llm.base import prompts

CHECK_IN = ("2012-04-03 18:00:09", 5, 31, 40.73, -74.0, "Café", 7)


@pytest.mark.parametrize("fields, text", [
    (prompts.FIELDS, "2012-04-03 18:00:09 user 5 POI id 31 (40.730000, -74.000000) <GPS 31> Café, category id 7."),
    (prompts.STAGE_1_FIELDS, "2012-04-03 18:00:09 user 5 POI id 31 (40.730000, -74.000000) <GPS 31>."),
    (("poi", "gps"), "POI id 31 <GPS 31>."), (("gps", "poi", "clock"), "18:00:09 POI id 31 <GPS 31>.")])
def test_fields(fields, text):
    assert prompts.check_in(fields, *CHECK_IN) == text


def test_order_and_empty_parts():
    question = prompts.question(5, ["s."], ["h."], ["c."], "Where?")
    assert question == ("<question>: Similar trajectories: s. History of user 5: h. Current trajectory of user 5: c. "
                        "Where?")
    assert prompts.question(5, [], [], ["c."], "Where?") == "<question>: Current trajectory of user 5: c. Where?"


def test_moments_by_hand():
    """Weekday, half hour, and how long after the one before: by hand. Sunday, 2012-04-01, 23:59:00 is the first."""
    minute, hour, day = 60, 3600, 86400
    gaps = [0, 5 * minute - 1, 5 * minute, hour - 1, hour, day - 1, day, 13 * day, 14 * day, 400 * day]
    seconds = list(itertools.accumulate([15431 * day + 24 * hour - minute, *gaps]))
    steps = [16, 0, 0, 1, 3, 4, 8, 9, 12, 13, 15]       # none; 0, 0, 5, 30 min; 1, 16 h; 1 day; 1, 2, 8 weeks
    moments = prompts.moments(seconds)
    assert [moment % 17 for moment in moments] == steps
    assert moments[:3] == [(6 * 48 + 47) * 17 + 16, (6 * 48 + 47) * 17, 0]      # 00:03:59 on Monday
    tokens, last = prompts.in_tokens(["a", "b"], seconds[:2], seconds[2])
    assert (tokens, last) == ([f"<TIME {moments[0]}>a", f"<TIME {moments[1]}>b"], "<TIME 0>")
    assert prompts.in_tokens([], [], 0) == ([], f"<TIME {3 * 48 * 17 + 16}>") and prompts.in_tokens([], []) == ([], "")


def test_round_trip():
    pair = prompts.join(prompts.question(5, [], [], ["POI id 4 <GPS 4>."], prompts.ask_poi("t", 5, 1, 9)),
                        prompts.answer_poi("t", 5, 4))
    prompt, answer = prompts.split(pair)
    assert prompt.endswith("<answer>:") and answer == " At t, user 5 will visit POI id 4."
    assert prompts.POI_ID.findall(prompt) == ["4"]      # the range of ids is not taken for check-ins
    assert prompts.GPS_TOKEN.findall(prompt) == ["4"] and "\n" not in pair
    with pytest.raises(ValueError, match="no <answer>:"):
        prompts.split("no marker")
