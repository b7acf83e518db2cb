from tests.distributed.conftest import made as made
from tests.distributed.conftest import other as other
