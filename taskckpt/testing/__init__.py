"""For tests of tasks, of engines and of stores: instant retries, faults at every request, real servers.

- ``instant_retries``: waiting between tries takes no time.
- ``intercepted``: a hook around every request to a store, to watch, break, pause or kill it there.
- ``InterceptedStore``: the same for one store.
- ``StoreContract``: the tests that every store must pass, to be subclassed by its author.
- ``taskckpt.testing.servers``: servers of one's own for S3, Google Cloud Storage and Azure
  (``pip install "taskckpt[testing]"``).
"""

from taskckpt.testing._contract import StoreContract
from taskckpt.testing._intercept import Hook, InterceptedStore, instant_retries, intercepted

__all__ = ["Hook", "InterceptedStore", "StoreContract", "instant_retries", "intercepted"]
