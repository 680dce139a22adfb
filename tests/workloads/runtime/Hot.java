/** Three methods that a JVM compiles: {@code Hot SECONDS}. Prints a line when they have been compiled. */
public final class Hot {
    private static int inner(int n) {
        int sum = 0;
        for (int i = 0; i < n; i++) {
            sum = sum * 31 + (i ^ (sum >>> 7));
        }
        return sum;
    }

    private static int down(int n, int depth) {
        return depth == 0 ? inner(n) : down(n, depth - 1) ^ depth;
    }

    private static int outer(int n) {
        int sum = 0;
        for (int i = 0; i < 100; i++) {
            sum ^= down(n + i, 20);
        }
        return sum;
    }

    public static void main(String[] arguments) {
        long start = System.nanoTime();
        long length = Long.parseLong(arguments[0]) * 1_000_000_000L;
        int result = 0;
        boolean isWarm = false;
        while (System.nanoTime() - start < length) {
            result ^= outer(10_000);
            if (!isWarm && System.nanoTime() - start > 3_000_000_000L) {
                isWarm = true;
                System.out.println("warm");
            }
        }
        System.out.println(result);
    }
}
