"""What an evaluation says, as lines of two columns."""


def table(report: dict) -> list[str]:
    """Lines of two columns, from a report as `tarflow_jax.scoring` writes it."""
    rows = [('checkpoint', report['checkpoint']['name']), ('test set', _set_name(report['data']))]
    for name, result in report['scores'].items():
        rows += [('', ''), *ROWS[name](result)]
    width = max(len(name) for name, _ in rows)
    return [f'{name:{width}}  {value}'.rstrip() for name, value in rows]


def _set_name(data: dict) -> str:
    return f'{data.get("dataset", "?")}, split {data.get("split", "?")}, {data["images"]} images'


def _bits_rows(r: dict) -> list[tuple[str, str]]:
    error = f'standard error {r["standard_error_over_images"]:.4f} over images'
    if r['draws'] > 1:
        error += f', {r["standard_error_over_draws"]:.2g} over draws'
    rows = [
        ('bits/dim', f'{r["bits_per_dim"]:.4f}  ({error}; {r["images"]} images, {r["draws"]} '
         'draws of the dequantisation; float32)'),
    ]
    if r['draws'] > 1:
        rows.append((
            f'bits/dim, importance-weighted bound, K = {r["draws"]}',
            f'{r["importance_weighted_bits_per_dim"]:.4f}  (standard error '
            f'{r["importance_weighted_standard_error_over_images"]:.4f} over images; tighter, '
            'not comparable with published numbers)',
        ))
    return [*rows, ('training loss', f'{r["loss"]:.4f} nats per dimension')]


def _classification_rows(r: dict) -> list[tuple[str, str]]:
    top_5 = f'; top 5 {r["top_5_accuracy"]:.2%}' if 'top_5_accuracy' in r else ''
    return [
        ('accuracy of argmax p(x | y)', f'{r["accuracy"]:.2%}  (standard error '
         f'{r["accuracy_standard_error"]:.2%}; {r["images"]} images{top_5})'),
        ('its calibration error', f'{r["calibration_error"]:.4f}  (mean confidence '
         f'{r["confidence"]:.4f}); {r["calibration_error_at_temperature"]:.4f} with log p divided '
         f'by {r["temperature"]:.4g}'),
    ]


def _outliers_rows(r: dict) -> list[tuple[str, str]]:
    rows = []
    for one in r['sets']:
        value = f'{one["bits_per_dim"]:.3f} +- {one["standard_deviation"]:.3f}'
        value += f', median {one["median"]:.3f}'
        if 'auroc_atypical' in one:
            value += f'  (AUROC {one["auroc_atypical"]:.3f} by atypical log p, '
            value += f'{one["auroc_low_log_p"]:.3f} by low log p)'
        rows.append((f'bits/dim of: {one["set"]}', value))
    return [*rows, ('histogram', 'outliers.png')]


def _round_trip_rows(r: dict) -> list[tuple[str, str]]:
    rows = [('round trip', f'of {r["images"]} images: largest error (root mean square)')]
    for dtype, passed in r['trusted'].items():
        found = r[dtype]
        ways = ('image_z_image', 'z_image_z')
        named = [(dtype, found)]
        named += [(f'{dtype}, block {b} alone', block) for b, block in enumerate(found['blocks'])]
        for name, errors in named:
            there, back = (_error(errors[way]) for way in ways)
            rows.append((name, f'image -> z -> image {there}, z -> image -> z {back}'))
        finite = f'not finite {found["not_finite"]:.2%} of samples'
        if 'guided_not_finite' in found:
            finite += f', {found["guided_not_finite"]:.2%} of guided ones'
        rows.append((
            f'{dtype}, log-determinant',
            f'forward + inverse {found["logdet_sum"]:.1e} bits/dim at most; off float32 by '
            f'{found["bits_per_dim_error"]:.1e} bits/dim at most; {finite}',
        ))
        verdict = ', '.join(f'{use} {"yes" if good else "NO"}' for use, good in passed.items())
        rows.append((f'{dtype} can be trusted for', verdict))
    return rows


def _error(error: dict) -> str:
    share = f', {error["not_finite"]:.1%} not finite' if error['not_finite'] else ''
    return f'{error["max"]:.1e} ({error["rms"]:.1e}){share}'


def _frechet_rows(r: dict) -> list[tuple[str, str]]:
    network = r['network']
    name = f'Frechet distance, {network["name"]} (not FID)'
    if r['is_fid']:
        name = 'FID' if network['published_weights'] else 'FID with weights of another checksum'
    rows = [('samples', f'{r["samples"]}, {r["samples_from"]}; pixels {r["pixels"]}')]
    for one in r['distances']:
        against = one['convention']
        if one['reference_images']:
            against += f', {one["reference_images"]} images'
        floor = f'{one["real_floor_images"]} real test images: {one["real_floor"]:.3f}'
        rows.append((name, f'{one["distance"]:.3f} to the {against}  ({floor})'))
        if 'spatial_distance' in one:
            rows.append(('sFID', f'{one["spatial_distance"]:.3f} to the {against}'))
    n = r['neighbours']
    rows.append(('precision, recall (k = 3)', f'{n["precision"]:.4f}, {n["recall"]:.4f}  '
                 f'({n["images_of_each"]} images of each)'))
    rows.append(('density, coverage (k = 5)', f'{n["density"]:.4f}, {n["coverage"]:.4f}'))
    return rows


ROWS = {
    'bits_per_dim': _bits_rows,
    'classification': _classification_rows,
    'outliers': _outliers_rows,
    'round_trip': _round_trip_rows,
    'frechet': _frechet_rows,
}
