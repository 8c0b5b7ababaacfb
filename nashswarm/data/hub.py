"""Check whether the Hugging Face hub can be reached.

Without a network the hub's clients retry for up to a minute.  In offline mode they read their cache or fail at once.
"""

import functools
import logging
import sys
import urllib.error
import urllib.request

import huggingface_hub.constants

log = logging.getLogger(__name__)
TIMEOUT = 5.0  # seconds


@functools.cache
def use_cache_if_unreachable() -> None:
    """Send one request to the hub, once per process; if it fails, switch the hub's clients to offline mode."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # an error status is an answer, too
    except OSError as error:
        log.info("the Hugging Face hub is out of reach (%s): only its local cache is used", error)
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # its import takes seconds, and reads the constant above
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
