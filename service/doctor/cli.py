"""The command `rnnserve doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from service.doctor.findings import Finding, Level
from service.rpc.flags import settings_options

SIGNS = {
    Level.OK: ("ok", "green"),
    Level.NOTE: ("note", None),
    Level.WARNING: ("warn", "yellow"),
    Level.PROBLEM: ("FAIL", "red"),
}
NOWHERE = "no-repository"
"""Stands for the repository where none is given."""


@click.command(short_help="Tell what works on this machine, and why the rest does not.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of settings, as serve takes it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options
@click.pass_context
def doctor(context: click.Context, /, config: Path | None, *, as_json: bool, **flags: str | None) -> None:
    """Tell what is installed and works on this machine, and of the rest why not and what to do.

    Takes the settings of serve. With a repository everything that serving it needs is asked for, and its models are
    loaded. Exit code 1 if something that was asked for does not work.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    findings: list[Finding] = []
    for finding in examine(given, config):
        findings.append(finding)
        if not as_json:
            _show(finding, is_first=finding.area not in {each.area for each in findings[:-1]})
    problems = [each for each in findings if each.level is Level.PROBLEM]
    if as_json:
        click.echo(json.dumps({"is_fine": not problems, "findings": [asdict(each) for each in findings]}, indent=2))
    else:
        click.echo(_verdict(findings))
    context.exit(1 if problems else 0)


def examine(flags: dict[str, Any], config: Path | None) -> Iterator[Finding]:
    """Look at everything."""
    from service.config import load_settings, sources_of
    from service.doctor.machine import check_machine
    from service.doctor.packages import asked_extras, check_packages
    from service.doctor.providers import check_providers
    from service.doctor.settings import check_ports, check_repository, check_tls, check_variables
    from service.errors import ConfigError

    try:
        sources = sources_of(flags, config)
        is_serving = sources["repository"] != "default"
        settings = load_settings(flags if is_serving else {**flags, "repository": NOWHERE}, config)
    except ConfigError as error:
        yield from check_packages(is_serving=False)
        yield Finding("settings", error.field or "settings", Level.PROBLEM, str(error), "mend that, then ask again")
        return
    yield from check_packages(is_serving=is_serving, asked=asked_extras(settings))
    is_chosen = sources["provider"] != "default"
    found = list(check_providers(settings.provider, is_serving=is_serving, is_chosen=is_chosen))
    yield from found
    yield from check_machine(settings, is_serving=is_serving)
    yield from check_variables()
    yield from check_ports(settings, is_serving=is_serving)
    yield from check_tls(settings)
    if is_serving and any(each.level is Level.OK for each in found):
        yield from check_repository(settings)


def _show(finding: Finding, *, is_first: bool) -> None:
    if is_first:
        click.secho(finding.area, bold=True)
    sign, colour = SIGNS[finding.level]
    click.echo(f"  {click.style(f'{sign:<4}', fg=colour)}  {finding.text}")
    if finding.advice:
        click.echo(f"        -> {finding.advice}")


def _verdict(findings: Iterable[Finding]) -> str:
    count = {level: sum(each.level is level for each in findings) for level in Level}
    if count[Level.PROBLEM]:
        return f"{count[Level.PROBLEM]} of what was asked for does not work, {count[Level.WARNING]} warnings"
    return f"all that was asked for works, {count[Level.WARNING]} warnings"
