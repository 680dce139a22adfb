// Go shapes: spins for SECONDS. Usage: shapes-go MODE SECONDS
// Modes: chain (30 deep), goroutines, allocate
package main

import (
	"fmt"
	"os"
	"sort"
	"strconv"
	"sync"
	"time"
)

var sink uint64
var deadline time.Time

//go:noinline
func spin() {
	var sum uint64
	for i := uint64(0); i < 200000; i++ {
		sum += i * sum
	}
	sink += sum
}

//go:noinline
func descend(depth int) int {
	if depth <= 1 {
		for time.Now().Before(deadline) {
			spin()
		}
		return 0
	}
	return descend(depth-1) + 1
}

type byValue []string

func (b byValue) Len() int           { return len(b) }
func (b byValue) Swap(i, j int)      { b[i], b[j] = b[j], b[i] }
func (b byValue) Less(i, j int) bool { return b[i] < b[j] }

//go:noinline
func allocate() {
	for time.Now().Before(deadline) {
		names := make([]string, 0, 100)
		for i := 0; i < 2000; i++ {
			names = append(names, strconv.Itoa(i*7919%2000))
		}
		sort.Sort(byValue(names))
		sink += uint64(len(names))
	}
}

func main() {
	if len(os.Args) != 3 {
		os.Exit(2)
	}
	seconds, err := strconv.ParseFloat(os.Args[2], 64)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	deadline = time.Now().Add(time.Duration(seconds * float64(time.Second)))
	switch os.Args[1] {
	case "chain":
		descend(30)
	case "goroutines":
		var group sync.WaitGroup
		for i := 0; i < 4; i++ {
			group.Add(1)
			go func() {
				defer group.Done()
				descend(10)
			}()
		}
		group.Wait()
	case "allocate":
		allocate()
	default:
		os.Exit(2)
	}
}
