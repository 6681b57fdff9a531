import logging

import pytest

from h3lm.ssm.first_use import first_use


@pytest.mark.parametrize(
    ("wrong", "told"), [("", ""), ("y differs", "y differs"), (OSError("a\nb"), "OSError: a")]
)
def test_a_check_runs_once_and_is_remembered(caplog, wrong, told):
    calls, found = [], {}

    @first_use(logging.getLogger("h3lm.ssm"), "{0} of {1} is off", found)
    def fault(name: str, length: int) -> str:
        calls.append(name)
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    with caplog.at_level("WARNING"):
        assert [fault("fft", 8), fault("fft", 8)] == [told, told]
    assert calls == ["fft"]
    assert found == {("fft", 8): told}
    assert [r.getMessage() for r in caplog.records] == (
        [f"fft of 8 is off: {told}"] if told else []
    )
