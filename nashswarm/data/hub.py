"""The Hugging Face hub, or doing without it.

Without a network the hub's clients retry for up to a minute; asked once, they answer from their cache or fail at once.
"""

import functools
import logging
import urllib.error
import urllib.request

import datasets
import huggingface_hub.constants

log = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds


@functools.cache
def use_cache_if_unreachable() -> None:
    """Ask the hub for a sign of life, once per process; without one its clients look into their cache only."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return  # it answers, whatever it says
    except OSError as error:
        log.info("the Hugging Face hub is out of reach (%s): its local cache has to do", error)
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
