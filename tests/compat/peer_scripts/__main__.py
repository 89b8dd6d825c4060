import json

from tests.compat.peer_scripts import SCRIPTS, load_peer, run

for script in SCRIPTS:
    load_peer(script)
print(json.dumps({script: run(script, ported=False) for script in SCRIPTS}, indent=0))
