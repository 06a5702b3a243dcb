from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes of the tests' tables are not kept among the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SAT_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
