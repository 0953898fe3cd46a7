"""Licences by the names that the Hub has for them."""

from __future__ import annotations

__all__ = ['LICENCE_IDS', 'licence_fields']

_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0
bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0
cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa
odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENCE_IDS = frozenset(_IDS.split())
"""The identifiers of https://huggingface.co/docs/hub/repositories-licenses."""


def licence_fields(licence: str | None) -> dict[str, str]:
    """Tell a licence to the Hub, which refuses identifiers that it does not know.

    Args:
        licence: An identifier of the Hub, or any other name.

    Returns:
        Fields of a card's front matter.

    Example:
        >>> licence_fields('MIT'), licence_fields('Acme Licence 2')
        ({'license': 'mit'}, {'license': 'other', 'license_name': 'Acme Licence 2'})
    """
    if not licence:
        return {}
    if licence.lower() in LICENCE_IDS:
        return {'license': licence.lower()}
    return {'license': 'other', 'license_name': licence}
