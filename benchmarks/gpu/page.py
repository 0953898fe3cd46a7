"""The page, the tables and the plots of a run."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agreement import FORMS
from matplotlib.figure import Figure

from repvgg_zoo.tools.markdown import markdown_table

Row = dict[str, Any]
BY_BRANCHES = 'training_by_branches'


def write_page(parts: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `README.md`, `speed.csv`, `agreement.csv` and plots from the results of the parts."""
    rows = [row | {'part': name} for name, part in parts.items() if has_rows(part) for row in part['rows']]
    agreeing = parts.get('agreement', [])
    agreeing = agreeing if isinstance(agreeing, list) else []
    inferring = [row for row in rows if row['work'] == 'infer']
    training = [row for row in rows if row['work'] == 'train']
    loading = [row for row in rows if row['work'] in ('load', 'fold')]
    text = [
        '# Measured on a GPU',
        'Written by `python benchmarks/gpu`. ' + '; '.join(f'{k} {v}' for k, v in parts['machine'].items()) + '.',
    ]
    if 'tests' in parts:
        text += ['## Device tests', last_line(parts, 'tests')]
    tables = [
        (
            '## Both forms agree',
            f'Largest difference from the branches in float64, relative to the largest output, over '
            f'{len({row["model"] for row in agreeing})} variants. [agreement.csv](agreement.csv) has each.',
            agreement_table,
            agreeing,
        ),
        (
            '## Inference',
            'Deploy form, bfloat16, channels_last; medians of interleaved rounds. In brackets: the time of the zoo '
            "over that of timm's fused model in the same setting, below 1 where the zoo is faster.",
            speed_table,
            inferring,
        ),
        (
            '## Training step',
            'Forward, loss and backward, bfloat16 autocast. Peak memory includes the weights; `kept` is what '
            "autograd keeps for the backward pass. In brackets: the zoo over timm's own.",
            training_table,
            training,
        ),
        (
            '## Loading',
            'From a safetensors file of training weights to a model on the device, and the switch of a model there.',
            speed_table,
            loading,
        ),
    ]
    for heading, introduction, table, measured in tables:
        if measured:
            text += [heading, introduction, table(measured)]
    if 'cifar10' in parts:
        text += ['## Training on CIFAR-10', last_line(parts, 'cifar10')]
    if missing := [f'- {line}' for line in skipped(parts)]:
        text += ['## Not measured', '\n'.join(missing)]
    seconds = ', '.join(f'{name} {seconds}' for name, seconds in parts['seconds'].items())
    (out / 'README.md').write_text('\n\n'.join([*text, f'Seconds of each part: {seconds}.']) + '\n')
    if agreeing:
        write_csv(out / 'agreement.csv', agreeing)
    if inferring:
        plot(inferring, out / 'inference.png', 'inference, images a second')
    if training:
        as_it_is = [row for row in training if row['part'] != BY_BRANCHES]
        plot(as_it_is, out / 'training.png', 'training step, images a second')
    if not rows:
        return {'error': 'no row was measured'}
    write_csv(out / 'speed.csv', rows)
    return {'rows': len(rows)}


def has_rows(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get('rows'), list)


def last_line(parts: dict[str, Any], name: str) -> str:
    part = parts.get(name, {})
    return f'`{part["last_line"]}`' if 'last_line' in part else part.get('error', 'not measured')


def skipped(parts: dict[str, Any]) -> Iterable[str]:
    for name, part in parts.items():
        if isinstance(part, dict):
            yield from (f'{name}: {line}' for line in part.get('skipped', []))
            if 'error' in part:
                yield f'{name}: {part["error"]}'


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def agreement_table(rows: list[Row]) -> str:
    settings = dict.fromkeys((row['dtype'], row['layout']) for row in rows)
    lines = []
    for dtype, layout in settings:
        chosen = [row for row in rows if (row['dtype'], row['layout']) == (dtype, layout)]
        worst = {form: max(chosen, key=lambda row, form=form: row[form]) for form in FORMS}
        lines.append((dtype, layout, *(f'{worst[form][form]:.1e} ({worst[form]["model"]})' for form in FORMS)))
    return markdown_table(lines, ('dtype', 'layout', *FORMS), text_columns=('dtype', 'layout', *FORMS))


def setting(row: Row) -> tuple[Any, ...]:
    return (row['form'], row['work'], row['runtime'], row['batch'], row['layout'], row['part'])


def beside_timm(row: Row, rows: list[Row], key: str) -> str:
    """The value over that of timm's own model in the same setting."""
    others = {(other['model'], setting(other)): other[key] for other in rows}
    theirs = others.get((f'timm:{row["model"]}', setting(row)))
    return f' ({row[key] / theirs:.2f})' if theirs else ''


def speed_table(rows: list[Row]) -> str:
    def column_of(row: Row) -> str:
        if row['work'] == 'infer':
            return f'{row["runtime"]}, batch {row["batch"]}'
        return 'switch' if row['work'] == 'fold' else f'load, {row["form"]} form'

    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        value = f'{row["latency_ms"]:.2f} ms{beside_timm(row, rows, "latency_ms")}'
        cells.setdefault(row['model'], {}).setdefault(column_of(row), value)
    columns = list(dict.fromkeys(map(column_of, rows)))
    lines = [(model, *(found.get(column, '') for column in columns)) for model, found in cells.items()]
    return markdown_table(lines, ('model', *columns), text_columns=('model',))


def training_table(rows: list[Row]) -> str:
    lines = [
        (
            row['model'],
            row['runtime'] + (', fast paths off' if row['part'] == BY_BRANCHES else ''),
            row['layout'],
            f'{row["images_per_s"]:.0f}',
            f'{row["latency_ms"]:.1f}{beside_timm(row, rows, "latency_ms")}',
            f'{row["peak_memory_mb"] or 0:.0f}',
            f'{row["saved_mb"]:.1f}{beside_timm(row, rows, "saved_mb")}',
        )
        for row in rows
    ]
    header = ('model', 'runtime', 'layout', 'images/s', 'step ms', 'peak MB', 'kept MB an image')
    return markdown_table(lines, header, text_columns=('model', 'runtime', 'layout'))


def plot(rows: list[Row], path: Path, title: str) -> None:
    rows = [row for row in rows if row['batch'] > 1]
    names = list(dict.fromkeys(row['model'] for row in rows))
    series = dict.fromkeys((row['runtime'], row['layout']) for row in rows)
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.5), layout='constrained')
    axes = figure.add_subplot()
    for index, (runtime, layout) in enumerate(series):
        values = {r['model']: r['images_per_s'] for r in rows if (r['runtime'], r['layout']) == (runtime, layout)}
        height = 0.8 / len(series)
        places = [names.index(name) + index * height for name in values]
        axes.barh(places, list(values.values()), height=height, label=f'{runtime}, {layout}')
    axes.set_yticks([place + 0.4 - 0.4 / max(1, len(series)) for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_title(title)
    if rows:
        axes.legend()
    figure.savefig(path, dpi=110)
