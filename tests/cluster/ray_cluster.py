"""
A Ray cluster on this machine, in a process of its own, since Ray reads its environment variables when it is imported. Run as
``python -m tests.cluster.ray_cluster``; it prints the address and its processes, and ends with standard input.
"""

import json
import sys

if __name__ == "__main__":
    from ray.cluster_utils import Cluster

    arguments = dict(num_cpus=2, object_store_memory=100_000_000)
    cluster = Cluster(initialize_head=True, head_node_args=dict(**arguments, include_dashboard=False))
    try:
        nodes = [cluster.head_node, *(cluster.add_node(**arguments) for _ in range(int(sys.argv[1]) - 1))]
        processes = [{kind: each[0].process.pid for kind, each in node.all_processes.items()} for node in nodes]
        print(json.dumps(dict(address=cluster.address, processes=processes)), flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()
