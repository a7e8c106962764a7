"""What the tests of several commands share."""

import sys

import pytest

from ncvsd_inverse import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command as a shell would; return exit status, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ncvsd", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run
