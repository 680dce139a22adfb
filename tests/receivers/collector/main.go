// An OpenTelemetry Collector for tests: the official service, OTLP receiver and data model, and an exporter of our
// own that keeps every request as a file before the sender is told that it arrived.
//
// When it ends it prints one JSON object with what its data model counted.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"sync"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/confmap/provider/envprovider"
	"go.opentelemetry.io/collector/confmap/provider/fileprovider"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/exporter"
	"go.opentelemetry.io/collector/exporter/xexporter"
	"go.opentelemetry.io/collector/otelcol"
	"go.opentelemetry.io/collector/pdata/pprofile"
	"go.opentelemetry.io/collector/receiver"
	"go.opentelemetry.io/collector/receiver/otlpreceiver"
	"go.opentelemetry.io/collector/service/telemetry"
	"go.uber.org/zap"
)

func main() {
	command := otelcol.NewCommand(otelcol.CollectorSettings{
		BuildInfo: component.BuildInfo{Command: "collector", Description: "OpenTelemetry Collector for tests"},
		Factories: factories,
		ConfigProviderSettings: otelcol.ConfigProviderSettings{ResolverSettings: confmap.ResolverSettings{
			ProviderFactories: []confmap.ProviderFactory{fileprovider.NewFactory(), envprovider.NewFactory()},
		}},
	})
	if err := command.Execute(); err != nil {
		log.Fatal(err)
	}
}

func factories() (otelcol.Factories, error) {
	receivers, err := otelcol.MakeFactoryMap[receiver.Factory](otlpreceiver.NewFactory())
	if err != nil {
		return otelcol.Factories{}, err
	}
	exporters, err := otelcol.MakeFactoryMap[exporter.Factory](xexporter.NewFactory(
		component.MustNewType("requests"),
		func() component.Config { return &config{} },
		xexporter.WithProfiles(newRequests, component.StabilityLevelDevelopment),
	))
	if err != nil {
		return otelcol.Factories{}, err
	}
	return otelcol.Factories{
		Receivers: receivers,
		Exporters: exporters,
		Telemetry: telemetry.NewFactory(func() component.Config { return nil }, telemetry.WithCreateLogger(newLogger)),
	}, nil
}

// newLogger is all the telemetry of its own that this Collector has: the usual implementation compiles in the clients
// of three clouds and of Kubernetes.
func newLogger(
	context.Context, telemetry.LoggerSettings, component.Config,
) (*zap.Logger, component.ShutdownFunc, error) {
	logger, err := zap.NewProduction()
	return logger, nil, err
}

// config says where the requests go.
type config struct {
	Folder string `mapstructure:"folder"`
}

// requests keeps each request as a file: opentelemetry.proto.profiles.v1development.ProfilesData, whose fields are
// those of an export request.
type requests struct {
	component.StartFunc
	folder string
	lock   sync.Mutex
	report report
}

// report is what arrived, by the types of the profiles ("samples/count") that the sums are of.
type report struct {
	Requests int              `json:"requests"`
	Rows     int              `json:"rows"`
	Values   map[string]int64 `json:"values"`
}

func newRequests(_ context.Context, _ exporter.Settings, cfg component.Config) (xexporter.Profiles, error) {
	return &requests{folder: cfg.(*config).Folder, report: report{Values: map[string]int64{}}}, nil
}

func (r *requests) Capabilities() consumer.Capabilities {
	return consumer.Capabilities{}
}

// ConsumeProfiles is called before the sender has its answer: a batch that waited would be lost with us.
func (r *requests) ConsumeProfiles(_ context.Context, profiles pprofile.Profiles) error {
	r.lock.Lock()
	defer r.lock.Unlock()
	bytes, err := (&pprofile.ProtoMarshaler{}).MarshalProfiles(profiles)
	if err != nil {
		return err
	}
	path := filepath.Join(r.folder, fmt.Sprintf("%06d.otlp", r.report.Requests))
	if err := os.WriteFile(path+".part", bytes, 0o644); err != nil {
		return err
	}
	if err := os.Rename(path+".part", path); err != nil {
		return err
	}
	r.report.Requests++
	r.report.add(profiles)
	return nil
}

func (r *requests) Shutdown(context.Context) error {
	r.lock.Lock()
	defer r.lock.Unlock()
	return json.NewEncoder(os.Stdout).Encode(r.report)
}

func (r *report) add(profiles pprofile.Profiles) {
	r.Rows += profiles.SampleCount()
	strings := profiles.Dictionary().StringTable()
	for _, resource := range profiles.ResourceProfiles().All() {
		for _, scope := range resource.ScopeProfiles().All() {
			for _, profile := range scope.Profiles().All() {
				kind := strings.At(int(profile.SampleType().TypeStrindex())) + "/" +
					strings.At(int(profile.SampleType().UnitStrindex()))
				for _, sample := range profile.Samples().All() {
					for _, value := range sample.Values().All() {
						r.Values[kind] += value
					}
				}
			}
		}
	}
}
