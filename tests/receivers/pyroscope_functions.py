"""Asks Pyroscope for a flame graph of the last hour and prints, for each function, the value of its frames.

A function that calls itself counts once for each of its frames. The root is called "total".

Usage: pyroscope_functions.py PORT QUERY
"""

import collections
import json
import sys
import urllib.parse
import urllib.request


def main():
    port, query = sys.argv[1:]
    parameters = {"query": query, "from": "now-1h", "until": "now", "format": "json", "maxNodes": 1_000_000}
    url = f"http://127.0.0.1:{port}/pyroscope/render?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url) as answer:
        graph = json.load(answer)["flamebearer"]
    functions = collections.Counter()
    # A level is a list of frames, four numbers each: distance to the one before, value, own value, name.
    for level in graph["levels"]:
        for value, name in zip(level[1::4], level[3::4]):
            functions[graph["names"][name]] += value
    for name, value in functions.items():
        print(value, name)


if __name__ == "__main__":
    main()
