// C++ with much that is inlined: containers, algorithms and regular expressions of the standard library.
//
// It is compared address by address with what other tools say about it, and need not run. Nothing is in an unnamed
// namespace and there are no closures: compilers give those no linkage names, and tools differ in what they call them.

#include <algorithm>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <numeric>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

namespace shapes {

struct Shape {
    virtual ~Shape() = default;
    virtual double area() const = 0;
};

template <typename Number> struct Rectangle : Shape {
    Number width, height;
    Rectangle(Number width, Number height) : width(width), height(height) {}
    double area() const override { return static_cast<double>(width) * static_cast<double>(height); }
};

struct MostFirst {
    template <typename Pair> bool operator()(const Pair& a, const Pair& b) const {
        return a.second != b.second ? a.second > b.second : a.first < b.first;
    }
};

template <typename Key, typename Value> std::vector<std::pair<Key, Value>> by_value(const std::map<Key, Value>& counts) {
    std::vector<std::pair<Key, Value>> pairs(counts.begin(), counts.end());
    std::sort(pairs.begin(), pairs.end(), MostFirst());
    return pairs;
}

std::map<std::string, int> words(const std::string& text) {
    std::map<std::string, int> counts;
    static const std::regex word("[a-z]+(?:-[a-z]+)*", std::regex::icase);
    for (std::sregex_iterator it(text.begin(), text.end(), word), end; it != end; ++it) {
        ++counts[it->str()];
    }
    return counts;
}

struct Horner {
    double x;
    double operator()(double sum, double coefficient) const { return sum * x + coefficient; }
};

struct Polynomial {
    std::vector<double> coefficients;
    double operator()(double x) const {
        return std::accumulate(coefficients.rbegin(), coefficients.rend(), 0.0, Horner{x});
    }
};

} // namespace shapes

int main(int count, char** arguments) {
    using namespace shapes;
    std::ostringstream text;
    for (int i = 0; i < count; i++) {
        text << arguments[i] << ' ';
    }
    for (const auto& [word, times] : by_value(words(text.str()))) {
        std::cout << word << ' ' << times << '\n';
    }
    std::vector<std::unique_ptr<Shape>> all;
    for (int i = 1; i <= count; i++) {
        all.push_back(std::make_unique<Rectangle<int>>(i, i + 1));
        all.push_back(std::make_unique<Rectangle<double>>(i * 0.5, i));
    }
    std::function<double(double)> value = Polynomial{{1, 2, 3}};
    double sum = 0;
    for (const auto& shape : all) {
        sum += value(shape->area());
    }
    std::cout << sum << '\n';
}
