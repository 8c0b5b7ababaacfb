"""Check whether the Hugging Face hub can be reached.

Without a network the hub's clients retry for up to a minute.  In offline mode they read their cache or fail at once.
"""

import functools
import logging
import sys
import threading
import urllib.error
import urllib.request

import huggingface_hub.constants

log = logging.getLogger(__name__)
TIMEOUT = 3.0  # seconds, of the whole request


@functools.cache
def use_cache_if_unreachable() -> bool:
    """Send one request to the hub, once per process; if it fails, switch the hub's clients to offline mode.

    Returns whether the hub answered.  The request runs in a thread of its own: a resolver without a network may block
    for longer than the timeout of a socket.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    failures: list[OSError] = []
    request = threading.Thread(target=_request, args=(failures,), daemon=True)
    request.start()
    request.join(TIMEOUT)
    if not failures and not request.is_alive():
        return True
    reason = failures[0] if failures else f"no answer in {TIMEOUT:g} s"
    log.info("the Hugging Face hub is out of reach (%s): only its local cache is used", reason)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # its import takes seconds, and reads the constant above
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return False


def _request(failures: list[OSError]) -> None:
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # an error status is an answer, too
    except OSError as error:
        failures.append(error)
